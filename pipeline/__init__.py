"""Layer-aware influence under DeepSpeed: every sample of every training step scored, harmful ones dropped.

The step, on every rank (train.py):

    batch   = samples.batch(position, size)                     one global order, a function of (seed, position)
    with estimator.capture(): logits = engine(batch)            hooks sketch every linear layer's input
    losses, feedback = token_losses(logits, labels)             softmax - onehot, sketched
    scores  = estimator.scores(units, feedback)                 moments M_u, one all-reduce M, S_u = <M_u, M>
    table   = UnitTable.gather(scores, losses, tokens)          every rank sees every unit
    weights = decide(table, policy)                             the same decision everywhere
    engine.backward(weighted_mean(losses, weights)); engine.step()
    recorder.step(table, weights)                               ledger, TensorBoard, checkpoint when due

Shapes are suffixes of names. B: samples of a rank's micro-batch; T: positions of a sequence; N = B T; n: some of the N;
U: units (sequences, or documents in them); D: width of a layer's input; K: sketched input width; V: vocabulary;
G: sketched gradient width; C: columns; S: subsets. Under ZeRO these are logical sizes, never shards.
"""
