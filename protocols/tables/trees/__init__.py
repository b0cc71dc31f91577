"""Gradient-boosted trees from summed histograms: the pure core. numpy only.

Chen and Guestrin, XGBoost, 2016 (arXiv 1603.02754), section 2.2, with histograms as in section 3.3.

**A round is a level.** A version has the trees so far, the cuts of all features and the nodes that
are asked for now (`layout`). An update has only the histograms of those nodes: sums of gradients
and of hessians for each node, feature and bin, as int32 (`histograms`). The coordinator adds the
updates up and splits (`growth`). Round 1 asks for counts on a fine grid, from which the cuts come.
Only the smaller of two siblings is asked for. The histograms of the other one are those of the
parent minus those of the smaller. The parents' histograms are state of the strategy, and the ledger
names that state with the version.

**Integers, so that the order does not matter.** Each gradient is rounded to a multiple of 2^-bits,
and 2^-bits follows from the number of rows. So N peers give the same trees as one peer with all
rows, byte for byte on one CPU architecture, and a secure sum is exact. The sums of a round are
those of one set of peers. If that set changes while a tree grows, no sibling can be subtracted. The
tree then ends at its current level, and the next one begins at its usual round.

**A level is decided from the committed sum only.** State and version are on disk before the ledger
names them, and both follow from the base, the state and the updates. So after a kill at any point
the level is decided again, with the same result.

**Bins.** Bin 0 is a missing value. A number has the bins between its cuts, in order. A category has
a bin of its own while there are bins, and shares bin 1 with rare and unseen ones otherwise. A split
is the set of bins that go left, as bits. It has the default direction of missing values in it.

**Hessians.** In a run without secure sums a peer sends the same hessian for each row, a constant of
the objective. The real hessian of a row is p(1 - p), which reveals its prediction: TimberStrike
(arXiv 2506.07605) reconstructs rows from these. In a secure run the coordinator sees only sums over
all peers, and peers send the real hessians.

**The owner's `min_count`.** If a node has some rows of a peer, but fewer than that, the peer counts
them in the sibling, in both histograms and in all levels below. So no node of a tree, and no
difference of a node and its sibling, is about fewer rows, whatever tree a coordinator asks about.
In a run without secure sums, bins with fewer rows of this peer count with their neighbors, also in
round 1, so that no cut singles out a value. Two risks remain: a cell of a node may have few rows,
and two crafted trees may differ in few rows. A secure run shows only the sums over all peers.
"""
