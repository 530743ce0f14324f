"""Two processes, everything between them in our hands, and one fault at one moment of one transfer.

    source process ══ data relay (frames) ══▶ destination process
                   ══ control relay (gRPC) ═▶

Read in this order: cells, actor, hub, data_relay, control_relay, play.
"""
