"""The filter audited: canaries whose truth is known, and a judge outside the loop."""
