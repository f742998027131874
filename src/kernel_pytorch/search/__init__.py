"""Predict, propose, try, choose: from a workload and a device to the trials of a plan."""
