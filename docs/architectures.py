"""Print the architectures that load as a table: adapter, what it takes, typical hub ids, what is tested."""

from __future__ import annotations

from veena_lens.checkpoints.registry import BUILT_IN, find_adapter


def main() -> None:
    print("| architecture | adapter | what | typical hub ids | tested against Hugging Face |\n|---|---|---|---|---|")
    for name, value in BUILT_IN.items():
        adapter = find_adapter(name)
        ids = ", ".join(f"`{hub_id}`" for hub_id in adapter.hub_ids)
        module = value.partition(":")[0]
        print(f"| `{name}` | `{module}` | {adapter.note} | {ids} | {adapter.tested} |")


if __name__ == "__main__":
    main()
