"""`python -m llmq`."""

import sys

from llmq.commands.cli import main

sys.exit(main())
