"""What each probe measures and how to read it, in plain words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """The fixed words of one section."""

    title: str
    measures: str = ""
    how_to_read: str = ""
    caution: str = ""


_TEXTS = {
    "compare": Text(
        "Comparison",
        "Training runs side by side where all of them have the same in-distribution loss (or have made the same steps, "
        "spent the same FLOPs or seconds): what each recipe, an arm, can do there, as a mean over its seeds.",
        "A difference is an arm minus the baseline, seed by seed. An interval that leaves zero out shows a difference; "
        "of many such intervals one in twenty does so by chance, which Holm's p values correct for.",
        "Intervals over two or three seeds are wide; one seed has none and shows nothing. Losses are smoothed by a "
        "running median of three and read between evaluations. Runs whose learning rate had decayed by different "
        "amounts do not compare.",
    ),
    "train": Text(
        "Training",
        "What a run says of itself: the loss of its steps and the parts that it is made of, the norm of the gradient "
        "before it is clipped, learning rates, the mean length of the states between the layers, speed, and how evenly "
        "the blocks of sparse FFNs are used.",
        "The loss is that of one step's own tokens, so it goes up and down with the text. MFU is the part of what the "
        "devices can do that goes into the model. Entropy is that of the load over blocks, divided by its highest "
        "possible value: 1 is even. Largest load is the share of choices that the most chosen block gets.",
        "Losses of training texts tell runs apart only where they read the same text in the same order. "
        "A total with penalties is not a language modelling loss.",
    ),
    "language_modelling": Text(
        "Language modelling",
        "How well the next or the masked tokens of text that was not trained on are predicted, by split and domain.",
        "Lower is better. Bits per byte compare models whatever their tokenizer; nats per token only those that share "
        "one. Bands and bars are 95 % intervals over documents; those of two models on the same text overlap even "
        "where the difference is certain.",
    ),
    "jump": Text(
        "Jump",
        "How far each layer turns the direction of the residual stream, and how much of that turn comes in a jump.",
        "A flat curve means even work; a rise at the end means that the last layers change the stream the most.",
    ),
    "nonlinearity": Text(
        "Non-linearity",
        "How well the best affine map replaces each element of a layer, scored on documents it was not fitted on.",
        "R² of 1 means that the element is affine on this text; 0 means that the map does no better than the mean; "
        "negative values mean that it does worse.",
        "For attention rows the approximator sees only the token's own input: the score mixes “not linear” with "
        "“uses other tokens”.",
    ),
    "similarity": Text(
        "Similarity",
        "How alike the states before, between and after the layers are, and how many directions they use.",
        "Bright blocks on the diagonal are groups of layers that change little; "
        "a low effective rank or a high anisotropy means that few directions carry the states.",
    ),
    "contribution": Text(
        "Contribution",
        "How much more the stream tells about the token to predict after each attention and each FFN. Estimators: "
        "mutual information between clusters of states and tokens, prediction of the token by the nearest mean state, "
        "and the loss of the model's own head on the state (lens). A half's share is what its steps add up to, divided "
        "by the whole gain from the embeddings to the last layer.",
        "An attention share above one half means that attention brings more of the prediction than the FFN. "
        "Trust an order of models on which the estimators agree.",
        "A step is the change it makes where it stands: attention that only gathers what a later FFN reads out earns "
        "nothing, and the FFN earns it all. The lens reads each state as if it were the last and favours late layers. "
        "Mutual information from few tokens is too high; the excess cancels only between states with equally many "
        "clusters and the same tokens. With few documents the intervals are wide, and with a gain near zero "
        "a share has no meaning.",
    ),
    "commutativity": Text(
        "Commutativity",
        "How much the model loses, without further training, when layers change places, are reversed, shuffled or "
        "repeated. The cost is the change of the loss; without a head, how far the last hidden state turns.",
        "A small cost means that the order of these layers matters little. "
        "Axes marked log-like are linear near zero and logarithmic beyond.",
        "The first and last layer often cost far more than the others and dominate every mean that includes them. "
        "A small cost does not mean that a layer is idle: two layers that do the same also change places for free.",
    ),
    "ablation": Text(
        "Ablation",
        "How much the model loses, without further training, when a part of a layer is removed (zero), replaced by its "
        "mean, by noise or by a fitted map, or when a residual is scaled.",
        "A small cost means that the model can do without this part on this text. Either one layer at a time is "
        "ablated, or all from the first up to one, or all from one up to the last. "
        "Axes marked log-like are linear near zero and logarithmic beyond.",
        "Zero takes the model to states it has never seen and so overstates what a part does; the mean is milder. "
        "Costs of single parts do not add up: later layers make up for what is missing, and parts that back each other "
        "up look unneeded one at a time.",
    ),
    "routing": Text(
        "Routing",
        "How tokens are spread over the experts (memory blocks) of each sparse FFN, which experts are chosen together, "
        "and what each expert does.",
        "Entropy is that of the load, divided by its highest possible value: 1 is an even load. Dead experts are never "
        "chosen; dropped choices found their expert full. Removal cost is what the model loses without one expert.",
        "On few tokens an expert looks dead, or tied to a token type, by chance. An even load does not mean that the "
        "experts do different things: a random choice is even too.",
    ),
    "options": Text(
        "Choice among options",
        "How often a model finds the right one of several continuations likeliest, with no or some examples before it.",
        "Bars are 95 % intervals over items. Rules of scoring differ in what they divide the log-probability by; the "
        "best of all rules is chosen on the items that it is judged on, so it is too high.",
    ),
    "minimal_pairs": Text(
        "Minimal pairs",
        "How often a model finds the acceptable one of two almost equal sentences likelier.",
        "Guessing gives one half. Errors are over pairs.",
    ),
    "cloze": Text(
        "Last word",
        "How often a model completes a passage with the word that stood there, and how likely it finds that word.",
        "Perplexity is e to the mean loss of the whole word: the number of equally likely words that would be as hard.",
    ),
    "early_exit": Text(
        "Early exit",
        "The loss on text when the model's own final norm and head read the stream after each layer, and how often the "
        "likeliest token is already that of the last layer.",
        "A curve that falls early means that middle layers can be read; the last point is the model's own loss.",
    ),
    "linear_probe": Text(
        "Linear probe",
        "How well a linear classifier tells the labels of texts from the states after each layer; the model is frozen.",
        "What stands in the states in a straight line is easy to use for what comes after; the rest is not missing.",
    ),
    "fine_tuning": Text(
        "Fine-tuning",
        "How well a model does on labelled texts after it was trained further on such texts with a new classifier.",
        "Intervals are t-intervals over trainings with other seeds. Rates and epochs are chosen on a held-out part of "
        "the training texts, never on the test.",
    ),
    "lm_eval": Text(
        "lm-evaluation-harness",
        "Numbers that lm-evaluation-harness computes from this model, edits included; its own names stand in the rows.",
        "Standard errors are the harness's, over items.",
    ),
}


def text_of(probe: str) -> Text:
    """The words for a probe; an unknown one gets its name."""
    return _TEXTS.get(probe, Text(probe))
