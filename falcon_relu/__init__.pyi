import infer as infer
import train as train

from . import corpora as corpora
from . import evaluation as evaluation
from . import plots as plots
from .checkpoints.convert import export_hf as export_hf
from .checkpoints.convert import import_hf as import_hf
from .checkpoints.load import load_model as load_model
from .checkpoints.native import save_params as save_params
from .config import FAMILY as FAMILY
from .config import FalconConfig as FalconConfig
from .config import family as family
from .errors import FalconError as FalconError
from .generation import Sampling as Sampling
from .generation import generate as generate
from .model import Falcon as Falcon
from .model import KVCache as KVCache
from .sharding import init_params as init_params
from .sharding import make_mesh as make_mesh
from .sharding import use_mesh as use_mesh
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import train_bpe as train_bpe
