"""Data selection: algorithms over Arrow rows and small states; how they are spread over a cluster is not theirs."""
