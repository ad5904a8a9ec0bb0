"""Ranking metrics, the popularity baseline and RePlay's report.

Import the module that is needed: `ranking` (on the device, each epoch), `popularity`, or `replay_report` (the
final figures by RePlay itself, whose import takes seconds and waits for the first call).
"""
