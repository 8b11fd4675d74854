"""The catalogue of findings: every rule that a command may find broken, with severity, text and remedy.

Longer than other modules, since it holds all texts of all commands' findings and nothing else. Several kinds share a
name where one rule is broken in different ways; docs/cli.md says what each name stands for.
"""

from __future__ import annotations

from mergekit_select.findings import Kind, Severity


def _error(name: str, rule: str, remedy: str = "") -> Kind:
    return Kind(name, Severity.ERROR, rule, remedy)


def _warning(name: str, rule: str, remedy: str = "") -> Kind:
    return Kind(name, Severity.WARNING, rule, remedy)


def _note(name: str, rule: str, remedy: str = "") -> Kind:
    return Kind(name, Severity.NOTE, rule, remedy)


# A table: name, rule, remedy.
# fmt: off

# --- the recipe's text ---

RECIPE_INVALID = _error("recipe-invalid",
    "{problem}", "{remedy}")
RECIPE_REFUSED = _error("recipe-invalid", "mergekit refuses the recipe: {problem}")
MERGE_NAMES_REPEAT = _error("recipe-invalid",
    "the merges of one file must have different names, one of them at most none", "rename one")
MERGES_CIRCULAR = _error("recipe-invalid", "merges must not need each other in a circle", "break the circle")
DUPLICATE_KEY = _error("duplicate-key",
    "a key must stand once in a mapping; YAML silently keeps the last one", "remove one, or join what they hold")
KEY_MISSPELT = _error("unknown-key",
    "mergekit does not know the key {key} and silently ignores it", "write {near}")
KEY_MISPLACED = _error("unknown-key",
    "{key} is one value for the whole merge, and mergekit ignores it for a single model",
    "move it to the recipe's parameters")
KEY_NOT_A_PARAMETER = _error("unknown-key",
    "{key} is a parameter of the method, and mergekit ignores it outside of parameters", "move it to {where}")
KEY_IGNORED = _warning("unknown-key",
    "mergekit silently ignores the key {key} here", "remove it, or see which method it belongs to")
METHOD_UNKNOWN = _error("unknown-method",
    "merge_method must be a method that is registered with mergekit.{broken}", "{choice}")
PLUGIN_INACTIVE = _error("plugin-inactive",
    "mergekit-yaml will not know the method here: {why}",
    "run `mergekit-select run yaml RECIPE OUT` instead, or install mergekit-select with pip in site-packages")
BASE_PARAMETER_IGNORED = _warning("base-parameter-ignored", "mergekit ignores {name} for the base model", "remove it")
BASE_LISTED = _note("base-listed",
    "the base is never drawn, so this entry does nothing", "to have it drawn like the others, leave base_model out")
FILTER_UNUSED = _warning("filter-unused",
    "a filter must be a part of a tensor's name, and no tensor's name has this one",
    "write a part of a name, such as self_attn")
FILTER_UNREACHED = _warning("filter-unused",
    "the first entry that fits a tensor decides, and one without a filter fits all, so this one is never reached",
    "put the entry without a filter last")
WEIGHT_OF_ALL = _warning("weight-of-all",
    "a list is a gradient over the layers, here the same for every model, and weights that are equal change nothing",
    "give each model a weight under its own parameters")
DTYPE_UNKNOWN = _error("dtype-unknown",
    "{key} must be a floating dtype that mergekit knows; it would fail, or write integers, halfway",
    "write bfloat16, float16, float32 or float64")
CHAT_TEMPLATE = _error("chat-template",
    "chat_template must be auto, a Jinja template, or one of mergekit's names; {effect}", "choose one of {known}")
CHAT_TEMPLATE_TIED = _warning("chat-template",
    "auto takes the template that most models have, and here mergekit chooses among {count} at random",
    "give the template's text, or one of mergekit's names")
TOKENIZER_UNION = _warning("tokenizer-union",
    "mergekit orders a union vocabulary by a set of models, whose order changes from run to run; nothing fixes it "
    "before Python 3.12, and PYTHONHASHSEED does from there on", "name one model, or base, as the source")

# --- parameters, once filters and gradients are resolved ---

PARAMETER_MISSING = _error("parameter-missing", "{problem}", "give it under parameters")
PARAMETER_INVALID = _error("parameter-invalid",
    "the method refuses the value of a parameter: {problem}", "give a value that the method takes")
PARAMETERS_REFUSED = _error("parameter-invalid", "{problem}")
WEIGHT_NOT_FINITE = _error("weight-not-finite",
    "a weight must be a finite number; any other fills the tensor with NaN", "give a finite weight")
WEIGHTS_ZERO = _error("weights-zero",
    "the weights of a tensor's models must not sum to 0 after filters and gradients; {effect}",
    "give one of them a positive weight there; to keep the base's values, list the base, too, and leave base_model out")
DRY_RUN = _error("dry-run", "{problem}", "change the parameters, or set dtype, such as dtype: bfloat16")

# --- models: where they are, and what their files are ---

MODEL_IS_FILE = _error("model-missing",
    "a local model must be a folder in Hugging Face format, and this is a file",
    "give the folder with config.json and safetensors")
MODEL_IS_GGUF = _error("model-quantised", MODEL_IS_FILE.rule, MODEL_IS_FILE.remedy)
MODEL_ABSENT = _error("model-missing",
    "there is no such folder here, and it is not the id of a model on the hub",
    "correct the path; relative paths start at the current folder")
MODEL_INCOMPLETE = _error("model-missing", "{problem}", "copy or download the model again")
MODEL_WITHOUT_WEIGHTS = _error("model-missing",
    "{folder} has neither model.safetensors nor pytorch_model.bin, whole or with an index",
    "copy or download the model again")
MODEL_IS_RUN = _error("model-missing",
    "{folder} has no weights of its own, and holds the states of a training", "give one of them, such as {last}")
MODEL_IS_ADAPTER = _error("model-missing",
    "the folder is a LoRA adapter, not a model", "write BASE+{name}, and give --lora-merge-cache")
MODEL_HAS_GGUF = _error("model-quantised",
    "mergekit reads no GGUF files, and {folder} has only {files}", "merge the original model, and convert the result")
MODEL_UNREADABLE = _error("model-unreadable", "{problem}", "copy or download the model again")
MODEL_PICKLED = _warning("model-pickled",
    "{file} is a pickle; check unpickles its tensors' descriptions only, with weights_only",
    "store the model as safetensors")
LAZY_UNPICKLE = _error("lazy-unpickle",
    "mergekit's --lazy-unpickle fails on Python 3.13 and later, and {model} is a pickle",
    "leave out --lazy-unpickle, or store the model as safetensors")
MODEL_AMBIGUOUS = _warning("model-ambiguous",
    "{folder} holds both {index}, which mergekit reads, and {single}, which transformers loads",
    "remove the one that is left from an earlier merge or download")
MODEL_QUANTISED = _error("model-quantised",
    "a model must be unquantised to be merged, and this one has {what}",
    "use the original model, or one that is dequantised and saved again")
SAME_FILE = _warning("same-file",
    "sub-models should differ, and this is the same file as {other} ({place})",
    "give another model, or a higher weight if that is intended")
SEED_REPEATS = _warning("seed-repeats",
    "selections that build on each other must have different seeds: one with seed {seed} made this model, both draw "
    "alike, and some of its own sub-models are hardly ever taken",
    "give this merge another seed")
LOCAL_PATH_LIKE_HUB_ID = _warning("local-path-like-hub-id",
    "a local path must begin with ./ or / for mergekit not to ask the hub about it when it writes the model card; "
    "offline that fails after the merge", "write ./{path}")
LOCAL_PATH_LIKE_HUB_ID_OFFLINE = _error("local-path-like-hub-id", LOCAL_PATH_LIKE_HUB_ID.rule, "write ./{path}")

# --- models on a hub ---

HUB_ID_NOT_PINNED = _warning("hub-id-not-pinned",
    "a hub id must name a commit so that everybody gets the same bits, and branches and tags can move",
    "write owner/name@<commit hash>")
HUB_REFUSES = _error("model-missing",
    "there is no such folder here, and the hub answers: {problem}",
    "correct the path or id, or log in with `hf auth login` for a gated or private model")
HUB_GATED = _error("model-missing",
    "there is no such folder here, and the hub answers: {problem}",
    "ask its owners for access on its page, then log in with `hf auth login`")
HUB_REVISION_GONE = _error("model-missing",
    "there is no such folder here, and the hub answers: {problem}", "name a branch, tag or commit that is there")
HUB_OFFLINE = _error("hub-unreachable",
    "there is no such folder here, and HF_HUB_OFFLINE keeps mergekit and check from asking the hub",
    "unset HF_HUB_OFFLINE, or give a local folder that begins with ./ or /")
HUB_UNREACHABLE = _error("hub-unreachable",
    "there is no such folder here, and asking {endpoint} failed: {problem}",
    "check the network, or give a local folder that begins with ./ or /")
HUB_FILE_INVALID = _error("model-unreadable", "{problem}", "report it to the model's author")
HUB_WITHOUT_CONFIG = _error("model-missing",
    "a model must have a config.json, and the repository has only {files}", "give a repository in Hugging Face format")
HUB_GGUF_WITHOUT_CONFIG = _error("model-quantised", HUB_WITHOUT_CONFIG.rule, "give a repository in Hugging Face format")
HUB_WITHOUT_WEIGHTS = _error("model-missing",
    "mergekit reads safetensors and PyTorch pickles, and the repository has only {files}",
    "give a repository with safetensors")
HUB_GGUF = _error("model-quantised", HUB_WITHOUT_WEIGHTS.rule, "give a repository with safetensors")
HUB_OTHER_WEIGHTS = _error("model-missing",
    "mergekit needs model.safetensors or its index, and the repository has neither: {problem}",
    "give another repository")
HUB_PICKLED = _warning("model-pickled",
    "the weights are pickles, whose tensors cannot be known without downloading them",
    "choose a revision with safetensors")

# --- LoRA adapters ---

ADAPTER_WITHOUT_CONFIG = _error("model-missing",
    "a LoRA adapter must be a folder with adapter_config.json, and {adapter} has none", "correct the path after the +")
ADAPTER_ABSENT = _error("model-missing",
    "there is no such adapter folder here, and it is not the id of an adapter on the hub",
    "correct the path after the +")
ADAPTER_WITHOUT_WEIGHTS = _error("model-missing",
    "a LoRA adapter must have its weights in adapter_model.safetensors, and {adapter} has none",
    "copy or download the adapter again")
ADAPTER_UNREADABLE = _error("model-unreadable", "{problem}", "copy or download the adapter again")
LORA_CACHE = _error("lora-cache",
    "mergekit merges a LoRA adapter into its model first, and needs a folder for the result",
    "give --lora-merge-cache FOLDER")
LORA_ARCHITECTURE = _error("lora-cache",
    "mergekit infers this architecture from tensor names, and cannot do so for LoRA adapters",
    "merge the adapter into its model with peft, and give the result")
LORA_CACHE_UNFINISHED = _error("lora-cache-stale",
    "mergekit takes any folder in the LoRA merge cache for a finished merge, and this one is not", "remove the folder")
LORA_CACHE_OLDER = _warning("lora-cache-stale",
    "mergekit takes the adapter's earlier merge from the LoRA merge cache, and the adapter is newer",
    "remove the folder")
LORA_INVALID = _error("lora-invalid",
    "{problem}", "give an adapter that was trained on this model, with its own adapter_config.json")
LORA_KIND_NOT_KNOWN = _note("not-known",
    "whether peft can merge this kind of adapter into the model is not known without doing it",
    "check that the adapter was trained on this model")
LORA_TENSORS_NOT_KNOWN = _note("not-known",
    "whether these tensors of the adapter fit the model is not known without merging them",
    "check that the adapter was trained on this model")

# --- models side by side ---

NO_BASE_MODEL = _warning("no-base-model",
    "without base_model mergekit takes config and tokenizer from an arbitrary model, and they differ",
    "make config and tokenizer files equal, or set base_model where the method does not merge it in, as linear does")
BASE_AVERAGED = _warning("base-averaged",
    "linear averages the base model, too", "leave base_model out, or list the base with the weight that it is to have")
NO_BASE_MODEL_BUT_EQUAL = _note("no-base-model",
    "without base_model mergekit takes config and tokenizer from an arbitrary model; here they are equal")
TIES_DIFFER = _warning("ties-differ",
    "models must agree on tie_word_embeddings: lm_head and embed_tokens are merged separately, and the output's config"
    " may then have transformers drop one of them",
    "save the tied models untied, with lm_head.weight stored, or choose others")
TOKENIZERS_DIFFER = _warning("tokenizers-differ",
    "tokens must have the same ids in all models, and {other} differs from {first}",
    "add tokenizer: {{source: base}} to the recipe, so that mergekit aligns the rows")
TOKENIZERS_CONFLICT = _error("tokenizers-differ", TOKENIZERS_DIFFER.rule, TOKENIZERS_DIFFER.remedy)
TOKENIZER_UNREADABLE = _warning("tokenizer-invalid",
    "the tokenizer files in {folder} cannot be read: {problem}", "copy or download the model again")
ARCHITECTURE_DIFFERS = _error("architecture-differs",
    "models must have one architecture for mergekit to merge them",
    "choose models of one architecture, or give --allow-crimes if you know better")
ARCHITECTURE_DIFFERS_ALLOWED = _warning("architecture-differs",
    ARCHITECTURE_DIFFERS.rule, "choose models of one architecture")
CONFIG_INVALID = _error("config-invalid",
    "transformers or mergekit cannot use its config.json: {problem}",
    "correct it, upgrade transformers, or give --trust-remote-code if the model brings its own code")
REMOTE_CODE = _note("remote-code",
    "the model brings code of its own, which check does not download", "download the model to check it")
WEIGHTS_NOT_KNOWN = _note("not-known",
    "the names and shapes of its tensors cannot be known without downloading the weights",
    "download the model to check it")
OUTPUT_NOT_KNOWN = _note("not-known",
    "what the merge {name} of this file writes is not known, and this one needs it", "see the findings of that merge")

# --- the plan ---

PLAN_FAILED = _error("plan-failed", "mergekit cannot plan the merge: {problem}")
TENSOR_NOT_PLANNED = _error("plan-failed", "{problem}")
ARCHITECTURE_NOT_INFERRED = _error("plan-failed",
    "mergekit cannot infer the architecture: {problem}", "choose models that mergekit knows")
BASE_MISSING = _error("inputs",
    "{method} needs a base model, and the recipe names none", "add base_model: what the models were fine-tuned from")
BASE_NOT_A_SOURCE = _error("inputs",
    "where a recipe has slices, mergekit wants base_model among the sources of each", "list it there too")
INPUTS = _error("inputs", "{problem}", "see what {method} takes, and name each model once")
LAYER_RANGE = _error("layer-range",
    "layer_range must be [first, end) with 0 <= first <= end <= {count}, the model's number of layers",
    "write a range within [0, {count}]")
LAYERS_DIFFER = _error("layers-differ",
    "all models must give the same number of layers to a merge",
    "choose models of one depth, or give each a layer_range of the same length under slices")
SLICES_UNEVEN = _error("slices-uneven",
    "the last slice must not have more sources than the first; mergekit takes {after} from {taken} only, without "
    "{left} and says nothing", "give the first and the last slice the same number of sources")

# --- tensors ---

TENSOR_MISSING = _error("tensor-missing",
    "mergekit needs the tensor from every model, and this model lacks it",
    "choose a complete model of the same architecture")
TENSOR_NEEDED = _error("tensor-missing", "a tensor that {method} needs is missing: {problem}", "choose other models")
TENSOR_PARTIAL = _warning("tensor-partial",
    "an optional tensor is missing from some of the models; it is merged from those that have it",
    "check that this is intended")
TENSOR_COPIED = _warning("tensor-partial",
    "an optional tensor is missing from all models but {holder}; it is copied", "check that this is intended")
TENSOR_SKIPPED = _warning("tensor-partial",
    "an optional tensor is missing from too many models; the output will not have it", "choose other models")
TENSOR_IGNORED = _warning("tensor-ignored",
    "mergekit silently leaves out tensors that the architecture does not list",
    "check that the output does not need them, or upgrade mergekit to one that knows the architecture")
TENSORS_MOSTLY_IGNORED = _error("tensor-ignored", TENSOR_IGNORED.rule, TENSOR_IGNORED.remedy)
TENSOR_CONVERTED = _note("not-known",
    "transformers converts the checkpoint's tensors to this one, so shape and dtype are unknown")
SHAPES_DIFFER = _error("shapes-differ", "a tensor must have one shape in all models", "choose models of one size")
VOCABULARIES_DIFFER = _error("shapes-differ",
    SHAPES_DIFFER.rule, "add tokenizer: {{source: base}} to align vocabularies")
TENSOR_DTYPES_DIFFER = _error("tensor-dtype",
    "an integer tensor must have one dtype in all models", "choose other models")
TENSOR_DTYPE = _error("tensor-dtype",
    "torch cannot promote the dtypes to one: {problem}", "set dtype, such as dtype: bfloat16")
INTEGER_TENSOR = _note("integer-tensor",
    "an integer tensor must be equal in all models for mergekit to copy it, and only reading it shows that")
DTYPES_MIXED = _warning("dtypes-mixed",
    "mergekit promotes the dtypes of a tensor to one, here {dtype}", "set dtype to the one you want")
BASE_DTYPE = _warning("base-dtype",
    "the base must have the sub-models' dtype, or hardly any parameter equals it and nothing is resampled",
    "set dtype to the coarser one, or give the base in the form that the sub-models were trained from")
MULTISLERP_BASE = _note("not-known",
    "with a base model multislerp fails on any tensor that no sub-model has moved", "leave out base_model if so")

# --- the output's tokenizer and config ---

VOCABULARY_CONFIG = _error("config-invalid",
    "the output takes {key} from {donor}, and transformers loads no tensor with other rows",
    "correct {key} in its config.json, or add tokenizer: {{source: base}}")
TOKENIZER_INVALID = _error("tokenizer-invalid",
    "mergekit cannot build the output's tokenizer: {problem}", "give every model its tokenizer files")
TOKENIZER_ROWS = _error("tokenizer-invalid",
    "every token of the tokenizer must have a row in the model's vocabulary, and this has {rows}",
    "give the model its own tokenizer, or resize its embeddings")
TOKEN_WITHOUT_SOURCE = _error("tokenizer-invalid",
    "a token must have a source where {reason}; mergekit cannot make its row of {tensor}",
    "give it a source, such as {{kind: zero}} or a model that has it")
TOKEN_SOURCE_INVALID = _error("tokenizer-invalid",
    "mergekit cannot take the row for {tensor} from there: {problem}", "name a model of the merge that has the token")
TOKENIZER_MISSING = _warning("tokenizer-missing",
    "mergekit copies the tokenizer from this model, and it has none",
    "copy one into the output, or give --no-copy-tokenizer")

# --- the output folder, disk and memory ---

OUT_NAME = _note("out-name",
    "mergekit takes the model card's title from the text after the last slash, and there is none", "write {name}")
OUT_NOT_WRITABLE = _error("out-not-writable",
    "the output must be a folder that can be written, and this is {what}", "give another folder")
OUT_IS_INPUT = _error("out-is-input",
    "the output must not be one of the inputs: the merge would overwrite it", "give another folder")
OUT_STALE = _error("out-stale",
    "the folder must not hold weights of an earlier merge: they would be loaded in place of the new ones",
    "remove them, or give another folder")
OUT_LEFTOVERS = _warning("out-stale",
    "weights of an earlier merge stay in the folder beside the new ones", "remove them, or give another folder")
OUT_OVERWRITTEN = _warning("out-overwritten",
    "the folder holds a model that is no merge, and mergekit overwrites it", "give another folder, or move the model")
OUT_RECORDED = _note("out-recorded",
    "mergekit-yaml leaves the record of the earlier merge in this folder, which will not be that of the new one",
    "merge with `mergekit-select run yaml`, which records anew, or remove {name}")
OUT_TEMPORARY = _note("out-temporary",
    "a merge that was interrupted left this file, and nothing removes it", "run `mergekit-select check --clean`")
DISK_FULL = _error("disk-full", "the output must fit on the disk", "free some, or merge into another folder")
MEMORY = _warning("memory",
    "the merge is expected to need more memory than there is", "give a smaller --out-shard-size, such as 1B")

# --- verify: a folder that is no finished output, in the words of reports without severity ---

CONFIG_MISSING = _error("unfinished", "missing: mergekit writes it after all tensors")
WEIGHTS_MISSING = _error("unfinished", "no weights are there: the merge has not ended", "merge again")
MERGE_UNFINISHED = _error("unfinished", "the merge has not ended", "give the same merge command again: it goes on")
SHARD_MISSING = _error("unfinished", "missing: {index} names this shard", "merge again")
INDEX_MISSING = _error("unfinished", "missing: mergekit writes it after all shards", "merge again")
SHARD_TEMPORARY = _error("unfinished", "left by a merge that was interrupted", "merge again into an empty folder")
RECIPE_MISSING = _error("unfinished",
    "missing: the merge has not ended, or was run with --no-write-model-card",
    "merge again, or give the recipe with --recipe")
WEIGHTS_NOT_NAMED = _error("stale", "{index} does not name it", "merge again into an empty folder")
WEIGHTS_STALE = _error("stale", "of another merge into this folder; transformers loads {loaded}", "delete the older")
SHARD_FORGOTTEN = _error("inconsistent",
    "{index} names no tensor of this shard, which is of the same merge", "restore the index, or merge again")
FILES_DISAGREE = _error("inconsistent", "{problem}")
COMPANION_MISSING = _error("unfinished",
    "missing: mergekit writes it after all tensors, unless run with --no-copy-tokenizer",
    "merge again, or give --no-copy-tokenizer")
COMPANION_DIFFERS = _error("inconsistent",
    "it is not the file that the recipe gives: {problem}", "merge again, or restore it")
COMPANION_EXTRA = _error("stale",
    "transformers or peft may load it, and the recipe gives no such file", "delete it")
ADAPTER_BESIDE = _error("stale",
    "where peft is installed, transformers applies this adapter to the weights, and the recipe gives none", "delete it")
TOKENIZER_REORDERED = _error("random", "{problem}: the order of a union vocabulary changes from run to run")

# --- provenance: is everything what a lock or a record says? ---

LOCK_RECIPE = _error("lock-stale",
    "the recipe must be the recorded one, of sha256 {expected}", "restore it, or lock it again")
LOCK_OPTION = _error("lock-stale",
    "{option} must be {expected!r}, as recorded", "give the same option, or lock with this one")
LOCK_DRAWS = _error("lock-stale",
    "the draws must be of version {expected}, as recorded", "install a mergekit-select that has them, or lock again")
LOCK_MODEL = _error("lock-stale", "the recipe and what is recorded must name the same models", "lock the recipe again")
INPUT_CHANGED = _error("input-changed",
    "{file} must have the recorded {algorithm} {expected}", "restore the file, or lock the recipe again")
INPUT_MISSING = _error("input-missing",
    "{file} is recorded and not there", "restore the file, or lock the recipe again")
INPUT_ADDED = _error("input-changed", "{file} is there and not recorded", "remove the file, or lock the recipe again")
PARENT_MISSING = _error("parent-missing", "the model must be there, and is not: {problem}")
PARENT_GATED = _error("parent-gated",
    "the model is gated, and the hub does not let this account read it",
    "ask for access on its page, then `hf auth login`")
PARENT_LOCAL = _error("parent-local",
    "the model lay in a folder of whoever made the merge", "get it from them, and give --map {path}=FOLDER")
REVISION_GONE = _error("revision-gone",
    "commit {commit} is not on the hub any more, and {revision} holds other bytes", "ask the model's owners for it")
REVISION_REPLACED = _note("revision-moved",
    "commit {commit} is not on the hub any more; {found} holds the same bytes and is taken instead")
REVISION_MOVED = _note("revision-moved",
    "{revision} has moved to {found}; the merge stays at {commit}", "lock with --upgrade {path} to follow it")
REVISION_REMOVED = _note("revision-moved",
    "{revision} is not on the hub any more; the merge stays at {commit}, which is", "name another revision next time")
LOCAL_BEFORE_HUB = _warning("local-before-hub",
    "mergekit takes the folder {path} below the current one before the hub's model, and drops a revision",
    "write ./{path} if the folder is meant, or run elsewhere")
HUB_HIDDEN = _error("local-before-hub",
    "mergekit would take the folder {path} below the current one instead of the hub's model", "run elsewhere")
VERSION_DIFFERS = _note("version-differs", "made with {package} {expected}")
NOT_RECORDED = _warning("not-recorded",
    "{what} cannot be known: this model comes without merge_provenance.json",
    "ask whoever made it for `mergekit-select verify OUT --record`")
REMOTE_CODE_RECORDED = _error("remote-code",
    "the merge was made with --trust-remote-code, and code from a hub is never run here",
    "merge with mergekit-yaml if you have read that code")
FOLDER_CHANGED = _error("changed", "must have the recorded sha256 {expected}",
    "restore the file; where another merge has overwritten the recorded one, remove merge_provenance.json")
FOLDER_LACKS = _error("changed", "is recorded and not there", "restore the file, or merge again")
FOLDER_ADDED = _error("changed", "is not recorded, and may be loaded with the model", "remove the file, or merge again")
SIGNATURE_WRONG = _error("signature",
    "must be of these files and verify with {who}: {problem}", "get the model again, or ask whoever signed it")
SIGNATURE_MISSING = _error("signature", "must be there and verify with {who}", "ask whoever published it for one")
SIGNATURE_UNCHECKED = _warning("signature-unchecked",
    "the folder is signed, and whose signature to expect was not said: it was not checked",
    "give --public-key, or --identity and --identity-provider")
PUBLISHED_BESIDE = _note("published-beside",
    "is published, too, and the merge did not write it", "move it away if it is not meant to be")
SIGNATURE_OLD = _error("signature",
    "the card is written anew, and a signature made before does not hold", "give --sign or --signing-key, or remove it")
LICENCE_FORBIDS = _error("licence",
    "{licence} forbids publishing what is made from the model", "ask the model's owners")
LICENCE_UNKNOWN = _warning("licence", "what {licence} allows is not known here", "read it before you publish")
RECIPE_LOCAL = _error("local-model",
    "others cannot get a model that lies in a folder of yours", "publish it first, or give --allow-local")

# --- verify: what the reader should know ---

METHOD_RANDOM = _warning("random",
    "{method} draws at random in every run: differing bits do not mean a different recipe")
METHOD_NOT_KNOWN = _warning("not-known",
    "{method} is an unknown method: whether it gives the same bits again is unknown")
METHOD_ROUNDS = _note("rounding",
    "{method} computes in floating point: another device, number of threads or version of torch may round otherwise",
    "verify with those of the merge")
UNION_REORDERED = _warning("random",
    "tokenizer: union reorders the vocabulary in every run: rows of embeddings and lm_head may be in another order,"
    " and a difference does not mean a different recipe",
    "an output that can be verified needs one model, or base, as the tokenizer's source")

LEFTOVER = _note("out-temporary", OUT_TEMPORARY.rule, OUT_TEMPORARY.remedy)
NO_TOKENIZER = _note("tokenizer-missing", "the recipe gives no tokenizer: {problem}")

# fmt: on

CATALOGUE = tuple(value for value in dict(globals()).values() if isinstance(value, Kind))
