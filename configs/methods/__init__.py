"""Ways of training a sparse FFN, one a file, each at the sizes of base.py.

`get_config()` is the tiny one; `--config=configs/methods/drelu.py:small`, or
`get_config("small")`, the one for a GPU. All have the parameters, the data and
the tokens of geglu.py; configs/suites/ffn_methods.py compares them.
"""
