"""Commands that measure speed and memory as ratios within one run; `python -m veena_lens.benchmarks` runs all."""
