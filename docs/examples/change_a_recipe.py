"""Train several students from one cache, at other temperatures: `python docs/examples/change_a_recipe.py RECIPE 1 2 4`.

A recipe is read, checked and changed as on the command line; errors say what is wrong, where, and the remedy.
"""

import sys

from teachercache import TeachercacheError, load_recipe, run_training


def main(path: str, *temperatures: str) -> None:
    for temperature in temperatures:
        changes = [f"objective.temperature={temperature}", f"train.output=runs/temperature-{temperature}"]
        try:
            summary = run_training(load_recipe(path, changes))
        except TeachercacheError as error:
            sys.exit(f"T = {temperature}: {error}")
        print(f"T = {temperature}: {summary['steps']} steps, losses {summary['losses']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
