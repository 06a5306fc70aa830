"""`python -m posttrain.control`: start the operator."""

from __future__ import annotations

import sys

from posttrain.control.app import main

sys.exit(main())
