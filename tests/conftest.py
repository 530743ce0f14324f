"""Every test runs as a member of one cluster, and so does every process that a test starts. No example is timed."""

from __future__ import annotations

import os
from typing import Final

from hypothesis import settings

from disaggregated.security.membership import Membership, join
from disaggregated.security.secret import VARIABLE, ClusterSecret

SECRET: Final = "the secret of all processes that tests start"

os.environ[VARIABLE] = SECRET
join(Membership(secret=ClusterSecret(SECRET)))

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
