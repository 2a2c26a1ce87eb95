"""The command line: a thin layer over Python functions that return values.

The whole request is checked, with nearest spellings, before torch is imported. One line per mistake on stderr; exit
code 2 for a request that cannot be met, 1 for a run that failed, 130 for Ctrl-C, 143 for SIGTERM.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from core.attention.registry import available, entry, nearest
from core.layout import PRESETS, check_name
from core.training.app import apps, get_app
from core.training.arguments import LISTS, SUITES, VERBS, build_parser
from core.training.errors import Interrupted, RunFailed, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _run(words)
    except UserError as error:
        return _say(error, 2, debug)
    except RunFailed as error:
        return _say(error, 1, debug)
    except Interrupted as error:
        return _say(error, error.exit_code, debug)
    except KeyboardInterrupt as error:
        return _say(error, 130, debug, "stopped by Ctrl-C")
    except BrokenPipeError:
        # The reader (`| head`) has gone; python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        return _say(error, 1, debug, " ".join(text.split()))


def _say(error: BaseException, code: int, debug: bool, text: str = "") -> int:
    if debug:
        raise error
    for line in (text or str(error)).splitlines():
        print(f"longspan: {line}", file=sys.stderr)
    return code


def _run(words: list[str]) -> int:
    parser, verbs = build_parser()
    if not words:
        parser.print_help()
        return 0
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in VERBS:
        raise UserError(f"unknown command {first!r}{nearest(first, VERBS)}; known: {', '.join(VERBS)}")
    args, rest = parser.parse_known_args(words)
    if not args.verb:
        said = f"unknown argument {rest[0]!r}" if rest else "no command given"
        raise UserError(f"{said}; known commands: {', '.join(VERBS)}")
    # argparse gives up on `fit RECIPE --resume key=value`: positionals after an option come back as a rest.
    stray = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if stray:
        options = [o for action in verbs[args.verb]._actions for o in action.option_strings]
        raise UserError(
            f"{args.verb}: unknown argument {stray[0]!r}{nearest(stray[0], options)}; see longspan {args.verb} --help"
        )
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *rest]
    return int(_ACTIONS[args.verb](args) or 0)


# -- light commands: no torch ------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> None:
    if args.what not in LISTS:
        raise UserError(f"cannot list {args.what!r}{nearest(args.what, LISTS)}; known: {', '.join(LISTS)}")
    rows = _ROWS[args.what]()
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())


def _recipe_rows() -> list[tuple[str, str]]:
    from core.training.recipe_files import recipes

    return [(reference, summary) for reference, _, summary in recipes()]


def _variant_rows() -> list[tuple[str, str]]:
    rows = []
    for name in available():
        options = ", ".join(f"{option}={default}" for option, default in entry(name).options.items())
        rows.append((name, entry(name).summary + (f" ({options})" if options else "")))
    layouts = [(name, f"{preset.summary}; {preset.word(8)}") for name, preset in PRESETS.items()]
    return [*rows, ("", ""), ("layouts", "patterns of layers, chosen like a variant: attention=based"), *layouts]


def _app_rows() -> list[tuple[str, str]]:
    return [(app.name, f"{app.summary} (metric: {app.metric}, {app.better} is better)") for app in apps().values()]


def _data_rows() -> list[tuple[str, str]]:
    from core.training.recipe_files import recipes
    from core.training.yaml_values import read_yaml

    rows = []
    for reference, path, _ in recipes():
        data = read_yaml(path).get("data") or {}
        rows.append((reference, ", ".join(f"{key}={value}" for key, value in data.items())))
    return rows


_ROWS = {"recipes": _recipe_rows, "variants": _variant_rows, "apps": _app_rows, "data": _data_rows}


def _show(args: argparse.Namespace) -> None:
    from core.training.recipe import dump, load_recipe

    print(dump(load_recipe(args.recipe, args.overrides)), end="")


def _cp(args: argparse.Namespace) -> None:
    from core.training.recipe_files import find_recipe

    path, _ = find_recipe(args.recipe)
    target: Path = args.target / path.name if args.target.is_dir() else args.target
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError(f"{target} is there already; delete it or choose another name") from error
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    print(f"{target}: edit it, then run: longspan fit {target}")


def _schema(args: argparse.Namespace) -> None:
    import json

    from core.training.recipe import schema

    print(json.dumps(schema(args.app), indent=2))


# -- heavy commands: checked first, then torch -------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> None:
    from core.training.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.resume and args.run_dir is None:
        raise UserError("--resume needs --run-dir, the folder of the run to continue")

    from core.training.fit import fit
    from core.training.result_table import print_result

    result = fit(recipe, run_dir=args.run_dir, resume=args.resume, floors=args.floors)
    print_result(result.metrics, result.run_dir, get_app(recipe.app).judged_for(recipe))


def _test(args: argparse.Namespace) -> None:
    _must_be_there(args.run, "run folder")

    from core.training.fit import evaluate
    from core.training.result_table import print_result
    from core.training.run import load_run

    print_result(evaluate(args.run, floors=args.floors), Path(args.run), load_run(args.run).app)


def _predict(args: argparse.Namespace) -> None:
    _must_be_there(args.run, "run folder or checkpoint")
    _must_be_there(args.input, "input file")

    from core.training.predict import predict

    for path in predict(args.run, args.input, args.output, args.overrides):
        print(path)


def _inspect(args: argparse.Namespace) -> None:
    _must_be_there(args.run, "run folder or checkpoint")
    _must_be_there(args.input, "input file")

    from core.training.predict import inspect

    for path in inspect(args.run, args.input, args.output, args.overrides):
        print(path)


def _compare(args: argparse.Namespace) -> None:
    from core.training.recipe import load_recipe

    load_recipe(args.recipe, args.overrides)
    variants = [word.strip() for word in args.variants.split(",") if word.strip()]
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    seeds = _seeds(args.seeds)

    from core.training.compare import compare
    from core.training.tables import print_comparison

    result = compare(
        args.recipe,
        variants=variants,
        seeds=seeds,
        jobs=args.jobs,
        run_dir=args.run_dir,
        overrides=args.overrides,
        baseline=args.baseline,
        grid=args.grid,
    )
    print_comparison(result.summary, result.run_dir)
    if result.failures:
        raise RunFailed(f"{len(result.failures)} of {len(result.summary.runs)} runs failed; the report shows them")


def _report(args: argparse.Namespace) -> None:
    _must_be_there(args.run, "folder of a comparison")

    from core.training.report import report

    for path in report(args.run):
        print(path)


def _bench(args: argparse.Namespace) -> None:
    variants, tasks, sizes = (
        [word.strip() for word in (text or "").split(",") if word.strip()]
        for text in (args.variants, args.tasks, args.sizes)
    )
    try:
        for word in variants:
            if args.recipe is None or word != "recipe":
                check_name(word.partition(":")[0])
    except ValueError as error:
        raise UserError(f"--variants: {error}") from error
    if args.recipe is not None:
        _bench_recipe(args, variants, sizes)
        return
    if args.sizes is not None or args.batch is not None:
        raise UserError(f"{'--batch' if args.sizes is None else '--sizes'} goes with a recipe: longspan bench RECIPE")
    suite = args.suite or "speed"
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}{nearest(suite, SUITES)}; known: {', '.join(SUITES)}")
    if suite == "speed" and args.seeds is not None:
        raise UserError("--seeds goes with --suite recall: speed has no randomness that matters")
    if suite == "speed" and args.tasks:
        raise UserError("--tasks goes with --suite recall")
    seeds = _seeds(args.seeds or "3")

    from core.training.bench import bench

    chosen = range(seeds) if isinstance(seeds, int) else seeds
    bench(suite, variants=variants, seeds=chosen, tasks=tasks, device=args.device, out=args.out)


def _bench_recipe(args: argparse.Namespace, variants: list[str], sizes: list[str]) -> None:
    from core.training.recipe import load_recipe

    load_recipe(args.recipe, args.overrides)
    for option in ("suite", "seeds", "tasks"):
        if getattr(args, option):
            raise UserError(f"--{option} goes with single layers; leave {args.recipe} or --{option} out")

    from core.training.costs import costs

    given = {"variants": variants, "sizes": sizes, "batch": 1 if args.batch is None else args.batch}
    costs(args.recipe, overrides=args.overrides, device=args.device, out=args.out, **given)


def _doctor(args: argparse.Namespace) -> int:
    from core.training.doctor import doctor

    return doctor()


def _seeds(text: str) -> int | list[int]:
    try:
        seeds = [int(word) for word in text.split(",") if word.strip() or "," not in text]
    except ValueError as error:
        raise UserError(f"--seeds must be a number of seeds or a list such as 0,4,7, got {text!r}") from error
    listed = "," in text
    if min(seeds, default=0) < (0 if listed and seeds else 1):
        raise UserError(f"--seeds must be at least 1, and seeds not negative, got {text!r}")
    return seeds if listed else seeds[0]


def _must_be_there(name: str, what: str) -> None:
    path = Path(name)
    if "://" not in name and not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no {what} {name!r}{nearest(path.name, beside)}")


_ACTIONS = {
    "list": _list,
    "show": _show,
    "cp": _cp,
    "fit": _fit,
    "test": _test,
    "predict": _predict,
    "inspect": _inspect,
    "compare": _compare,
    "report": _report,
    "bench": _bench,
    "doctor": _doctor,
    "schema": _schema,
}
