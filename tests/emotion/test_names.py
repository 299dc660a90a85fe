"""Public names of `veena_lens.emotion`: where each lives, what it is, and that it says so."""

import pkgutil
from importlib import import_module

import pytest

from veena_lens import emotion


@pytest.mark.parametrize("name", emotion.__all__)
def test_name_is_a_documented_function_or_class_of_the_module_listed(name: str) -> None:
    found = getattr(emotion, name)
    assert callable(found) and str(found.__module__).startswith("veena_lens.emotion.")
    assert (found.__doc__ or "").strip() and not found.__doc__.startswith(f"{name}(")  # no dataclass's default
    home = import_module(emotion._HOMES[name])
    assert getattr(home, name) is found


def test_no_public_name_is_a_module_s() -> None:
    modules = {m.name for m in pkgutil.iter_modules(emotion.__path__)}
    assert not modules & set(emotion.__all__)
    for module in modules:  # nor does a module hold a function of its own name
        assert not callable(getattr(__import__(f"veena_lens.emotion.{module}", fromlist=[module]), module, None))


def test_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'key_layer'"):
        emotion.key_layer  # noqa: B018


def test_rows_are_sorted_by_module_then_name_as_the_table_says() -> None:
    rows = [(home, name) for name, home in emotion._HOMES.items()]
    assert rows == sorted(rows)
