"""Secure aggregation: the coordinator learns the sum of a cohort's updates and no single update.

Bonawitz et al. 2017 (CCS '17, the variant against a server that lies), on a complete graph up to 65
peers and on a k-regular ring above (Bell et al. 2020, CCS '20). Pure; nothing here reads a clock, a
file or a socket, and randomness comes in as arguments.

    ring       integers modulo 2^16 or 2^32: rounding, scales, weights, checks of the sum
    masks      key streams of AES-256-CTR, added to an array of the ring
    keys       X25519, HKDF, sealed shares
    shamir     secret sharing
    messages   the structs of the steps ready, share, mask, agree, unmask
    cohort     who takes part: cards, ring of neighbors, thresholds, integer weights
    peer       the agent's side: one state for each turn, one answer for each step
    aggregator the coordinator's side
    recovery   the masks to remove, from the shares that peers told
"""
