"""What a run did and what its DWM preferred: read from run folders, written as figures and one report."""
