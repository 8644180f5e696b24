"""`python -m lord_tune`, and `accelerate launch -m lord_tune decompose ...` on several processes."""

from .cli import main

main()
