"""The commands and their options. Nothing is checked here that needs a recipe or torch."""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from core.training.errors import UserError

VERBS = {
    "list": "what there is: recipes, variants, apps or data",
    "show": "a recipe with everything filled in",
    "cp": "copy a recipe to a file of your own",
    "fit": "train, test, and leave everything in a run folder",
    "test": "test a run again",
    "predict": "predictions of a run for a file",
    "inspect": "look inside a run while it reads a file: attention maps, saliency",
    "compare": "train several variants over several seeds and report the differences",
    "report": "write the report of a comparison again",
    "bench": "how fast the variants are on this device, and what they remember",
    "doctor": "check this installation",
    "schema": "JSON Schema of an app's recipes, for editors",
}
LISTS = ("recipes", "variants", "apps", "data")
SUITES = ("speed", "recall")


class Parser(argparse.ArgumentParser):
    """argparse with one line per mistake, told like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        # argparse counts key=value among what is missing, though none is needed.
        raise UserError(f"{message.replace(', key=value', '')}; see {self.prog} --help")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `longspan`, and those of its commands by name."""
    parser = Parser(prog="longspan", description="Long sequences: one attention core, apps, measured answers.")
    parser.add_argument("--version", action="version", version=f"longspan {version('longspan')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=Parser)
    verbs = {
        name: subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, text in VERBS.items()
    }
    for verb in verbs.values():
        verb.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def recipe(verb: str) -> None:
        verbs[verb].add_argument(
            "recipe", metavar="RECIPE", help="APP/NAME as `longspan list recipes` shows it, or a YAML file"
        )

    def overrides(verb: str) -> None:
        verbs[verb].add_argument(
            "overrides", metavar="key=value", nargs="*", help="such as attention=linear optim.lr=1e-3"
        )

    def later(verb: str) -> None:
        verbs[verb].add_argument(
            "overrides", metavar="predict.key=value", nargs="*", help="settings of the recipe's section predict"
        )

    def run(verb: str, what: str) -> None:
        # Not a Path: that would turn https:// into https:/, and the address could no longer be refused as one.
        verbs[verb].add_argument("run", metavar="RUN", help=what)

    verbs["list"].add_argument(
        "what", nargs="?", default="recipes", metavar="WHAT", help=f"{', '.join(LISTS)}; recipes unless said otherwise"
    )
    recipe("show")
    overrides("show")
    recipe("cp")
    verbs["cp"].add_argument("target", metavar="FILE", type=Path, help="the copy; must not exist")
    recipe("fit")
    overrides("fit")
    verbs["fit"].add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<app>-<recipe>-<time>")
    verbs["fit"].add_argument("--resume", action="store_true", help="continue the run in --run-dir, if there is one")
    verbs["fit"].add_argument(
        "--no-floors", dest="floors", action="store_false", help="do not compute the app's floors"
    )
    run("test", "a run folder")
    verbs["test"].add_argument(
        "--no-floors", dest="floors", action="store_false", help="keep the floors that are there"
    )
    run("predict", "a run folder or a .ckpt file")
    verbs["predict"].add_argument("--input", required=True, metavar="FILE", help="what to predict for")
    verbs["predict"].add_argument("--output", required=True, metavar="FILE", help="where to write")
    later("predict")
    run("inspect", "a run folder or a .ckpt file")
    verbs["inspect"].add_argument("--input", required=True, metavar="FILE", help="what to look at")
    verbs["inspect"].add_argument("--output", required=True, metavar="DIR", help="folder for plots and pages")
    later("inspect")
    recipe("compare")
    overrides("compare")
    verbs["compare"].add_argument(
        "--variants", required=True, metavar="A,B,C", help="each may carry options: hybrid:window=16:feature_map=relu"
    )
    verbs["compare"].add_argument(
        "--seeds", default="3", metavar="N", help="a number of seeds (default 3), or a list 0,4,7"
    )
    verbs["compare"].add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    verbs["compare"].add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: runs/compare-<app>-<recipe>-<time>"
    )
    verbs["compare"].add_argument(
        "--baseline", metavar="A", help="the variant that others are compared with; default: the first"
    )
    verbs["compare"].add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="settings side by side; may be given several times",
    )
    run("report", "the folder of a comparison")
    bench = verbs["bench"]
    bench.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="measure this recipe's model at several sizes; none: single layers"
    )
    overrides("bench")
    bench.add_argument("--suite", metavar="SUITE", help=f"of single layers: {' or '.join(SUITES)}; default: speed")
    bench.add_argument("--variants", default="", metavar="A,B,C", help="such as gla,hybrid:window=16")
    bench.add_argument(
        "--seeds", metavar="N", help="of recall's models: a number of seeds (default 3), or a list 0,4,7"
    )
    bench.add_argument("--tasks", default="", metavar="A,B", help="of recall: pairs, needle; default: both")
    bench.add_argument("--sizes", metavar="A,B", help="of a recipe's model: such as 224,512,480x640")
    bench.add_argument("--batch", type=int, metavar="N", help="of a recipe's model: items per pass (default 1)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: a CUDA device if there is one")
    bench.add_argument("--out", type=Path, metavar="FILE", help="also write the figures here, as JSON")
    verbs["schema"].add_argument("app", metavar="APP", help="as `longspan list apps` shows it")
    return parser, verbs
