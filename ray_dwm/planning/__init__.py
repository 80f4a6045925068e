"""What a run will need, before it is started: memory, time, communication, cost; and the cheapest layout that fits."""
