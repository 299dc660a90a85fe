"""Every table, one after another."""

from __future__ import annotations

from veena_lens.benchmarks import forward, sweeps

if __name__ == "__main__":
    forward.main()
    sweeps.main()
