"""The application of a chord's worker and of its joiner: the measured process has the same."""

from __future__ import annotations

import json
import os

from chords import CHORD_PEERS
from peers import Job

job = Job(**json.loads(os.environ["FASTRES_BENCH_JOB"]))
app = CHORD_PEERS[job.peer](job).app
