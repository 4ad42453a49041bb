"""Suites of configs to compare; `get_suite(size)` returns one."""
