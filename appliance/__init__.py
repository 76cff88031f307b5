"""The appliance: a single-node LLM serving system that honours latency budgets."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when somebody asks: the look-up imports more than a worker needs."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("appliance")
    except PackageNotFoundError:  # running from a source tree that was never installed
        return _version_of_source()


def _version_of_source() -> str:
    """`0.1.0+source`: what the tree's pyproject.toml says."""
    import tomllib
    from pathlib import Path

    try:
        text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text("utf-8")
        return f"{tomllib.loads(text)['project']['version']}+source"
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "0+unknown"
