"""Makes gemma3n_topk.json: Gemma 3n's own activations, by `transformers`.

  pip install torch transformers
  python tests/golden/make_gemma3n_topk.py

It runs `Gemma3nTextMLP` on random weights in float32 and keeps what goes in
and what comes out of its Gaussian top-k, and of the whole layer.
"""

import json
import pathlib

import torch
import transformers
from transformers.models.gemma3n import configuration_gemma3n
from transformers.models.gemma3n import modeling_gemma3n

SPARSITY = 0.75


def main():
  torch.manual_seed(0)
  config = configuration_gemma3n.Gemma3nTextConfig(
      hidden_size=8, intermediate_size=[32], num_hidden_layers=1,
      activation_sparsity_pattern=[SPARSITY], layer_types=["full_attention"],
      num_kv_shared_layers=0)
  mlp = modeling_gemma3n.Gemma3nTextMLP(config, layer_idx=0)
  x = torch.randn(5, 8)
  with torch.no_grad():
    gate = mlp.gate_proj(x)
    golden = {
        "made_with": f"transformers {transformers.__version__}, "
                     f"torch {torch.__version__}",
        "sparsity": SPARSITY,
        "x": x, "gate": mlp.gate_proj.weight.T, "up": mlp.up_proj.weight.T,
        "down": mlp.down_proj.weight.T, "gate_output": gate,
        "topk_output": mlp._gaussian_topk(gate), "mlp_output": mlp(x),
    }
  path = pathlib.Path(__file__).with_name("gemma3n_topk.json")
  path.write_text(json.dumps(
      {k: v.tolist() if torch.is_tensor(v) else v
       for k, v in golden.items()}) + "\n")


if __name__ == "__main__":
  main()
