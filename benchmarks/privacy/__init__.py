"""A measured attack: which of N private contexts was used? Asked of the tokens of edge fusion and of the deltas of cloud fusion.

The attacker is an honest but curious server. It knows the query, both models, the steering strength, the budget and the N
candidate contexts, each as likely as any other before it sees anything. It does not know the device's random numbers.

``cases`` makes the candidates, ``mechanism`` the answers, ``attackers`` guess, ``measures`` count, ``experiments`` put these
together, ``outside`` asks what the top k misses, ``report`` and ``plots`` show it. Run it with ``python -m benchmarks.privacy``.
"""
