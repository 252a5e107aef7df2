"""Data-set jobs: sources, frozen plan, worker, store, report."""
