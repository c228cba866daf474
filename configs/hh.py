"""The paper's experiment: GPT-2 on Anthropic's HH pairs, helpful and harmless.

    python -m experiments.reproduce --config=configs/hh.py --workdir=results/hh

Reads data and weights from the Hugging Face hub; for local folders add
`--config.data.path=DIR --config.model.checkpoint=DIR`. On an accelerator raise `train.rows` and
set `model.dtype=bfloat16`. Expected: not measured with the pretrained weights and all of HH;
README.md shows a run on a small sample with random weights.

With an argument, `configs/hh.py:helpful,quantile`, only that workload and head are trained.
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    """The config; `arg` is '' or 'workload,head'."""
    config = ConfigDict()
    workload, _, head = arg.partition(',')

    config.seed = 0  # of parameters, batch order and dropout; the data have a seed of their own
    # What `train` trains on; `data.path` says which there are. `reproduce` has a list below.
    config.workload = workload or 'helpful'

    # --- comparisons ---------------------------------------------------------------------------
    config.data = data = ConfigDict()
    # 'demo', a .jsonl or .jsonl.gz file, a folder of the HH layout, or a hub data set.
    data.path = 'Anthropic/hh-rlhf'
    data.max_length = 0  # tokens of a dialogue with EOS; 0: the model's number of positions
    data.overlong = 'truncate_prompt'  # longer dialogues: or 'drop', 'error'
    data.attributes = ()  # keys of rows that are ratings of attributes; (): of the whole response
    data.append_eos = True  # the reward is read at the last token: EOS, or the text's own last
    data.validation_fraction = 0.05  # share of training prompts held out to choose a checkpoint
    data.test_fraction = 0.1  # share of prompts held out where the source has no test split
    data.max_malformed = 0.0  # share of rows that may be malformed, skipped and counted
    data.demo = demo = ConfigDict()  # read if path is 'demo'
    demo.train = 4000  # pairs to learn from
    demo.test = 2000  # pairs to evaluate on
    demo.seed = 0  # of the generated dialogues and judgements
    demo.annotators = 'independent'  # one for each response; 'shared', 'panel': one for both

    # --- model ---------------------------------------------------------------------------------
    config.model = model = ConfigDict()
    model.checkpoint = 'openai-community/gpt2'  # folder or hub name; '': random, sizes below
    model.tokenizer = ''  # folder or hub name; '': the checkpoint's, or one trained on the data
    model.dtype = 'float32'  # of the computation, or 'bfloat16'; parameters are float32
    model.attention = 'auto'  # the fastest known for the device; or 'dense', 'tiled', 'pallas'
    model.remat = False  # recompute blocks in the backward pass: slower, less memory
    model.dropout = 0.0  # on embeddings, attention and residual branches while training
    model.sizes = sizes = ConfigDict()  # read if there is no checkpoint
    sizes.vocab_size = 50257  # tokens of the embedding, and of a tokenizer trained on the data
    sizes.n_positions = 1024  # longest dialogue
    sizes.n_embd = 768  # width
    sizes.n_layer = 12  # blocks
    sizes.n_head = 12  # attention heads

    # --- head and loss -------------------------------------------------------------------------
    config.head = ConfigDict()
    # 'scalar', 'gaussian', 'categorical', 'quantile', 'monotone_quantile' (cannot cross),
    # 'implicit_quantile' or 'annotator'; `reproduce` has a list below.
    config.head.name = head or 'quantile'
    config.head.num_quantiles = 10  # N of the quantile heads, tau_i = (i + 0.5) / N
    config.head.num_atoms = 21  # of the categorical head, evenly spaced
    config.head.atom_range = 5.0  # of the categorical head: atoms from -5 to 5, units of reward
    config.head.num_cosines = 64  # of tau, that the implicit quantile head reads
    config.head.num_factors = 1  # numbers in which annotators differ (annotator head)
    config.head.members = 1  # heads with parameters of their own, an ensemble if several
    config.loss = loss = ConfigDict()
    # Objective of each head. From preferences: 'bradley_terry', 'bradley_terry_quantile_huber'
    # (the paper's), 'distributional_bradley_terry', 'posterior_quantile_regression',
    # 'plackett_luce', and 'quantile_bradley_terry' (a control); from ratings: 'ratings_pinball',
    # 'ratings_quantile_huber', 'ratings_crps'; from preferences of annotators with a name:
    # 'annotator_bradley_terry'. Which can train which head, `losses.OBJECTIVES` says.
    loss.scalar = 'bradley_terry'
    loss.gaussian = 'distributional_bradley_terry'
    loss.categorical = 'distributional_bradley_terry'
    loss.quantile = 'bradley_terry_quantile_huber'
    loss.monotone_quantile = 'distributional_bradley_terry'
    loss.implicit_quantile = 'distributional_bradley_terry'
    loss.annotator = 'annotator_bradley_terry'
    loss.targets = 'label'  # of the quantile Huber loss: +1 / -1; or 'margin', 'teacher' (control)
    loss.huber_weight = 0.1  # lambda, weight of the quantile Huber loss
    loss.kappa = 1.0  # threshold of the Huber loss, in units of reward
    loss.ema_decay = 0.99  # of the teacher's parameters, a moving average
    loss.anchor_weight = 1.0  # weight of an annotator's ratings beside its preferences
    loss.label_smoothing = 0.0  # share of preferences taken to be the wrong way round
    loss.centre_weight = 0.0  # weight of (r_chosen + r_rejected)^2, which keeps rewards around 0
    loss.entropy_weight = 0.0  # weight of the entropy of categorical rewards
    loss.lm_weight = 0.0  # weight of the language-model loss on the preferred response

    # --- optimisation --------------------------------------------------------------------------
    config.optimizer = optimizer = ConfigDict()
    optimizer.name = 'adamw'  # or 'sgd'
    optimizer.learning_rate = 1e-5  # peak
    optimizer.schedule = 'cosine'  # after warm-up: or 'linear', 'constant', 'inverse_sqrt'
    optimizer.warmup_fraction = 0.03  # share of the run over which the rate rises
    optimizer.final_fraction = 0.0  # cosine, linear: share of the peak at the end
    optimizer.b1 = 0.9  # AdamW: decay of the mean of gradients
    optimizer.b2 = 0.95  # AdamW: decay of the mean of squared gradients
    optimizer.eps = 1e-8  # AdamW: added to the root of the second moment
    optimizer.weight_decay = 0.0  # AdamW: on matrices, not on norms and biases
    optimizer.clip_norm = 1.0  # largest norm of the gradient; 0: no clipping

    # --- training ------------------------------------------------------------------------------
    config.train = train = ConfigDict()
    train.batch_size = 64  # comparisons a step, over all devices
    train.epochs = 1.0  # passes over the training comparisons; the run's last step may be short
    train.max_steps = 0  # ends the run early; 0: no limit
    train.row_length = 1024  # tokens of a packed row, or more where a dialogue needs them
    train.rows = 1  # rows of a micro-batch on one device; a step runs as many as it needs
    train.sharding = 'replicated'  # state on several devices: a copy on each, or 'fsdp': in shards
    train.checkpoint_every = 100  # steps between held-out evaluations, each with a checkpoint
    train.keep = 2  # last checkpoints to keep, beside the best
    train.log_every = 10  # steps between fetching metrics from the device and writing them
    train.tensorboard = False  # also write TensorBoard files (needs tensorboardX)

    # --- evaluation and analysis ---------------------------------------------------------------
    config.evaluation = evaluation = ConfigDict()
    evaluation.checkpoint = 'best'  # by the held-out loss; or 'last'
    # JSON Lines files of prompt + responses; the first are judged against the second.
    evaluation.candidates = ''  # responses whose win rate is asked for
    evaluation.references = ''  # responses to the same prompts
    # Rules by which to choose among rated responses: 'mean', 'quantile:tau', 'cvar:alpha' (mean of
    # the lowest share) or 'mean-std:k', and what the chosen ones are rated.
    evaluation.rules = ('mean', 'quantile:0.1', 'cvar:0.2', 'mean-std:1')
    config.analysis = analysis = ConfigDict()
    analysis.bootstrap = 300  # replicates of the prompt-clustered bootstrap
    analysis.null_draws = 300  # draws of the within-pair swap null
    analysis.level = 0.95  # of the intervals
    analysis.seed = 0  # of the resampling

    # --- reproduce: which models ---------------------------------------------------------------
    config.reproduce = ConfigDict()
    config.reproduce.workloads = (workload,) if workload else ('helpful', 'harmless')
    config.reproduce.heads = (head,) if head else ('scalar', 'quantile')

    return config.lock()
