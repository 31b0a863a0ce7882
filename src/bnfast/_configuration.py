"""The BNFAST_* variables, read once at import, and what this build and this machine are."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from bnfast import _core, _memory, _program, _threads, _validation
from bnfast._version import __version__

VARIABLES = (
    *("BNFAST_ISA", "BNFAST_NUM_THREADS", "BNFAST_OUTPUT_POOL_LIMIT"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY"),
)


def _choose_isa() -> None:
    """Obey BNFAST_ISA, in any case: a mistake must not run another variant in silence."""
    available = _core.available_isas()
    given = os.environ.get("BNFAST_ISA", "")
    wanted = given.lower()
    if not wanted:
        _core.activate(available[0])
    elif wanted in available:
        _core.activate(wanted)
    elif wanted in _core.built_isas():
        raise ImportError(f"BNFAST_ISA={given}, but this machine runs only: {', '.join(available)}")
    else:
        raise ImportError(
            f"BNFAST_ISA={given}, but this build has only: {', '.join(_core.built_isas())}"
        )


def _choose_threads() -> None:
    wanted = os.environ.get("BNFAST_NUM_THREADS", "")
    if not wanted:
        return
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ImportError(f"BNFAST_NUM_THREADS must be a positive integer, got {wanted!r}")
    _threads.obey_environment(int(wanted))


def _choose_pool() -> None:
    wanted = os.environ.get("BNFAST_OUTPUT_POOL_LIMIT", "") or str(_memory.DEFAULT_LIMIT)
    if not wanted.isdecimal():
        raise ImportError(
            f"BNFAST_OUTPUT_POOL_LIMIT must be a number of bytes, at least 0, got {wanted!r}"
        )
    _memory.set_output_pool_limit(int(wanted))


def _obey_environment() -> None:
    """Obey the variables; a wrong value ends bnfast's own commands with one line."""
    try:
        _choose_isa()
        _choose_threads()
        _choose_pool()
    except ImportError as error:
        if not _program.is_starting():
            raise
        print(f"{_program.called()}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


_obey_environment()


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this build has and this machine runs, best first.

    ``BNFAST_ISA`` chooses one of them before import; the results are the same bits with any.
    `show_config` says which one is used.

    Returns
    -------
    tuple of str
        From ``"avx512"``, ``"avx2"`` and ``"baseline"``.

    Examples
    --------
    >>> import bnfast
    >>> "baseline" in bnfast.available_isas()
    True
    """
    return _core.available_isas()


def _caches() -> dict[str, str]:
    level2, last_level = _core.cache_sizes()
    return {"level 2": f"{level2 >> 10} KiB", "last level": f"{last_level >> 10} KiB"}


def _openmp() -> dict[str, Any]:
    facts = _core.build_facts()
    runtimes: list[str] | str = "unknown: threadpoolctl is not installed"
    try:
        import threadpoolctl
    except ImportError:
        pass
    else:
        runtimes = [
            f"{pool['prefix']} ({pool['filepath']}), {pool['num_threads']} threads"
            for pool in threadpoolctl.threadpool_info()
            if pool["user_api"] == "openmp"
        ]
    return {
        "built with OpenMP": facts["openmp_version"] > 0,
        "version": facts["openmp_version"] or None,
        "library": facts["openmp_library"],
        "all runtimes in this process": runtimes,
    }


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show what was built and what runs.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it as nested dictionaries, like ``numpy.show_config``.

    Returns
    -------
    dict or None
        Of ``"dicts"``: ``"bnfast"``, ``"build"``, ``"instruction sets"`` (``"built"``,
        ``"available"``, ``"active"``), ``"OpenMP"``, ``"threads"``, ``"caches"``,
        ``"output pool"`` and ``"environment"``. None for ``"stdout"``.

    Raises
    ------
    ValueError
        For any other mode.

    Examples
    --------
    >>> import bnfast
    >>> config = bnfast.show_config(mode="dicts")
    >>> config["bnfast"]["version"] == bnfast.__version__
    True
    >>> config["instruction sets"]["active"] in bnfast.available_isas()
    True
    """
    _validation.choice("mode", mode, ("stdout", "dicts"))
    import platform  # takes longer to import than the rest of bnfast

    built = _core.built_isas()
    config: dict[str, Any] = {
        "bnfast": {
            "version": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "platform": f"{sys.platform} {platform.machine()}",
        },
        "build": {"compiler": _core.build_facts()["compiler"], "flags": built},
        "instruction sets": {
            "built": list(built),
            "available": list(_core.available_isas()),
            "active": _core.active_isa(),
        },
        "OpenMP": _openmp(),
        "threads": {
            "used for large work": _threads.get_num_threads(),
            "chosen by": _threads.chosen_by(),
            "allowed by affinity": _threads.allowed_threads(),
        },
        "caches": _caches(),
        "output pool": {
            "limit": f"{_memory.get_output_pool_limit() >> 10} KiB",
            "kept now": f"{_core.output_pool_bytes() >> 10} KiB",
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }
    if mode == "dicts":
        return config
    for section, facts in config.items():
        print(f"{section}:")
        _print_facts(facts)
    return None


def _print_facts(facts: dict[str, Any], indent: str = "  ") -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_facts(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            print(f"{indent}{name}: {'not set' if value is None else value}")
