"""What pruning methods share: sizes of a decoder, widths under a budget, the pruned branch."""
