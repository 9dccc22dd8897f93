"""How many examples hypothesis tries: all of them in `make test-all`, a third in the short tier alone."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

from tests.support.environment import SHORT


def examples(number: int, **more: Any) -> settings:
    return settings(max_examples=-(-number // 3) if SHORT in os.environ else number, deadline=None, **more)
