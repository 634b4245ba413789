from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Toy tensors gain nothing from threads; set before torch is imported, and inherited by children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Two shared cores: no example fails for being slow.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
