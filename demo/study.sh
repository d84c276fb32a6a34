#!/usr/bin/env bash
# The ablations on the demo: every arm, five seeds, the table and the figure. Resumable; --quick is a small version.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" demo/study.py "$@"
