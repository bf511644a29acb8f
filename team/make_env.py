"""Write .env, what compose.yaml asks for, with a new secret on every empty line of .env.example.

python team/make_env.py
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write it, readable by its owner alone. One that is there is left as it is: the servers know its secrets."""
    target = ROOT / ".env"
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    text = re.sub(r"^(\w+)=$", lambda line: f"{line[1]}={secrets.token_hex(16)}", example, flags=re.MULTILINE)
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        sys.exit(
            f"found: {target} is there\n"
            "allowed: no such file; databases know the secrets of an old one\n"
            "to do: keep it, and add what it lacks of .env.example"
        )
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    print(f"{target}: keep a copy in a safe place")


if __name__ == "__main__":
    main()
