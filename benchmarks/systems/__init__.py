"""Whole systems beside each other on one machine: `python -m benchmarks.systems`.

catalogue.py   what is measured: ours, split and mixed, and the peers that `python -m benchmarks.peers` installed
serving.py     starts one of them, checks where its threads run, and stops it
client.py      one streamed completion, and when its tokens came
loads.py       the three loads: one client, a batch of clients, long prompts among running chats
results.py     one JSON file that parts are added to, so that a run can be resumed
verdicts.py    ratios and bars; plot.py draws the interference
"""
