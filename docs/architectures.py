"""Print two tables of the supported architectures: what they take and typical hub ids; what is tested."""

from __future__ import annotations

from veena_lens.checkpoints.registry import BUILT_IN, find_adapter


def main() -> None:
    adapters = {name: find_adapter(name) for name in BUILT_IN}
    print("| architecture | what it takes | typical hub ids |\n|---|---|---|")
    for name, adapter in adapters.items():
        print(f"| `{name}` | {adapter.note} | {'<br>'.join(adapter.hub_ids)} |")
    print("\n| adapter | tested against Hugging Face |\n|---|---|")
    for name, adapter in adapters.items():
        module = BUILT_IN[name].partition(":")[0]
        print(f"| `{module}` | {adapter.tested} |")


if __name__ == "__main__":
    main()
