"""Child process of the tests: one run of the flow `solo` for each JSON line on stdin, its state as a line on stdout."""

import json
import os
import sys

from flows.recipe import solo


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked, own = json.loads(line), dict(os.environ)
        os.environ |= asked["env"]
        state = solo(recipe="toy", **asked["parameters"], return_state=True)
        os.environ.clear()
        os.environ |= own
        answers.write(json.dumps({"completed": state.is_completed(), "message": state.message}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
