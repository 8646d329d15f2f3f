"""The verb serve."""

from importlib.util import find_spec

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.errors import InputError
from megdet.program import UNUSED, loading

_PACKAGES = {"fastapi": "fastapi", "python_multipart": "python-multipart", "uvicorn": "uvicorn"}


def run_serve(arguments: Arguments) -> None:
    """Serve one or two runs until SIGTERM or Ctrl-C."""
    check_packages()
    with loading(UNUSED):
        from megdet.app.application import make_application
        from megdet.app.batcher import Batcher
        from megdet.app.requests import Limits
        from megdet.app.runs import load_runs
        from megdet.app.server import address_of, bound_socket, is_loopback, make_server, run_until_stopped

    with bound_socket(arguments.host, arguments.port) as own:
        if not is_loopback(own):
            PROGRESS.print(
                f"Anybody who reaches {address_of(own)} can use it: there is no password, and nothing is encrypted."
            )
        paths = [path for path in (arguments.run, arguments.other) if path is not None]
        runs = load_runs(paths, arguments.device, arguments.overrides, fold=arguments.fold)
        limits = Limits(int(arguments.max_mib * (1 << 20)), arguments.seconds)
        with Batcher(runs, arguments.queue) as batcher:
            names = " and ".join(run.name for run in runs)
            app = make_application(batcher, limits, [arguments.host, *arguments.allow_host])
            server = make_server(app, lambda: CONSOLE.print(f"{names} at {address_of(own)} (Ctrl-C stops)"))
            run_until_stopped(server, [own])
        CONSOLE.print(f"stopped after {batcher.answered} image(s) in {batcher.calls} call(s) of a detector")


def check_packages() -> None:
    """Raise InputError where the extra of the web demo is not installed."""
    missing = [name for module, name in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}: pip install 'megdet[serve]'")
