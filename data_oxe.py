"""Open X-Embodiment / RLDS episodes on disk -> batches of frame pairs. Pure tf.data, one file.

    python data_oxe.py list        --data data                              # registry, and what is present
    python data_oxe.py inspect     --data data --mix metaworld_corner4      # counts, ranges, histogram, contact sheet
    python data_oxe.py stats       --data data --mix bridge                 # percentiles, mean, std per dimension, cached
    python data_oxe.py from-videos --videos clips --captions clips.csv --name clips --fps 10     # MP4/WebM -> RLDS
    python data_oxe.py bench       --fake oxe29                             # speed and memory on this machine

As a module (the only code the stages share):

    loader = Loader("data", "bridge:0.7,fractal20220817_data:0.3", split="train", batch_size=64, image_size=224)
    for batch in loader: ...            # endless, numpy; loader.state_dict() / load_state_dict() to resume
    for batch in loader.to("cuda"): ... # the same as tensors, the next batch already on its way

Terms. A *trajectory* (episode) is a sequence of T *frames* (steps); step t holds the image seen before action t.
A batch is a dict of numpy arrays and one list:

    frames       uint8   (B, 2, H, W, 3)   frame t and frame t+k, k = the dataset's offset
    instruction  list of B str             '' where the dataset has none
    actions      float32 (B, C, A)         label actions t .. t+C-1, in the dataset's own units
    action_mask  bool    (B, C)            False past the end of the episode
    action_sum   float32 (B, A)            what was executed over t..t+k, accumulated by kind (see KINDS)
    state        float32 (B, Ds)           proprioception at t
    dataset, episode, step  int64 (B,)     index in the mix, episode number in the split, t
    has_action   bool    (B,)

A and Ds are the mix's maxima; narrower datasets are zero-padded on the right. With resize="gpu" `frames` keeps the
decoded size: one array if all pictures of the batch agree, else a list of B arrays (2, h, w, 3); to() resizes.
Letters below: B batch, T time, C chunk, A action width, Ds state width, N pairs an episode, Q episodes a block.

Why it is built so: nearly all the cost of RLDS is decoding images that nobody looks at, and tf.data's per-dataset
parallel readers. Here an episode is parsed flat, only the images of N random pairs are gathered, still encoded; they
are mixed and shuffled in ONE place of bounded size, and only what leaves it is decoded.

    draw     the mix picks datasets, not pairs; a draw is the next episode of the dataset picked. So how far each
             dataset was read is a count that Python can make without reading, whatever the episodes hold.
    block    Q draws, their pairs shuffled; blocks replace tf.data's shuffle buffer, whose content would have to be
             saved. A position is (block, pairs taken of it, draws before it): a resume skips within the files that
             were open (eight in all, or one a dataset), and reads at most one block again.
    random   every random number is a function of (seed, what it is for); nothing depends on threads or on history.
    fault    readers report bad episodes to Python and give no pairs for them; nothing is dropped silently.
"""
import os
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")            # unused here, and it greets on every start
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "4")     # the default of 64 MB is held per open file
import contextlib
import io
import json
import re
import shutil
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from queue import Full, Queue

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

tf.config.set_visible_devices([], "GPU")                       # the accelerator belongs to torch


# ---------------------------------------------------------------------------------------------- registry (data)
# One letter an action dimension says how executed actions accumulate over a frame pair t..t+k:
KINDS = {"d": "delta: sum over t..t+k-1", "p": "absolute position: value at t+k minus value at t",
         "g": "gripper or quaternion: last value", "v": "velocity: sum times dt",
         "u": "meaning not verified: last value, not counted as motion", "-": "stored, but no part of the action"}


@dataclass(frozen=True)
class Entry:
    """Where things are in one dataset; keys are relative to a step and may hold '/'. Source: features.json, the TFDS
    catalog and the OXE transforms of Octo and OpenVLA. In the specs, parts are separated by spaces; `d*3,g` is `dddg`."""
    version: str
    frame: str                  # recorded height x width and encoding ('?': no source says; read from the bytes anyway)
    image: str                  # key of the main camera
    instruction: str            # key(s): several are variants of which one is drawn; '' where there are none
    action: str                 # key:letters[:storage], one KINDS letter a stored dimension; storage as in SCHEMA_TYPES
    state: str                  # key:width[:storage]
    hz: float                   # control frequency, steps a second; 0 where no source says
    offset: int = 5             # k, steps between the two frames of a pair
    first: int = 0              # leading steps that the dataset's own transform drops
    executed: str = ""          # as action, for action_sum, where it is not the labelled action


def _metaworld() -> Entry:
    return Entry("1.0.0", "64x64 png", "observation/image", "language_instruction", "action:dddg", "observation/state:4",
                 hz=80, offset=8, executed="executed_action:dddg")


REGISTRY: dict[str, Entry] = {
    **{f"metaworld_{camera}": _metaworld()
       for camera in ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")},
    "fractal20220817_data": Entry("0.1.0", "256x320 jpeg", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/gripper_closedness_action:g",
        "observation/base_pose_tool_reached:7 observation/gripper_closed:1", hz=3, offset=3),
    "kuka": Entry("0.1.0", "512x640 jpeg", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/gripper_closedness_action:g",
        "observation/clip_function_input/base_pose_tool_reached:7:zlib observation/gripper_closed:1:zlib", hz=10),
    "bridge": Entry("0.1.0", "480x640 ?", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/open_gripper:g:bool()", "observation/state:7", hz=5, first=1),
    "bridge_orig": Entry("1.0.0", "256x256 jpeg", "observation/image_0", "language_instruction", "action:ddddddg",
        "observation/state:7", hz=5, first=1),
    "taco_play": Entry("0.1.0", "150x200 ?", "observation/rgb_static", "observation/natural_language_instruction",
        "action/rel_actions_world:ddddddg", "observation/robot_obs:15", hz=15),
    "jaco_play": Entry("0.1.0", "224x224 ?", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:ddd action/gripper_closedness_action:g", "observation/end_effector_cartesian_pos:7", hz=10),
    "berkeley_cable_routing": Entry("0.1.0", "128x128 ?", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:vvv action/rotation_delta:vvv", "observation/robot_state:7", hz=10),
    "roboturk": Entry("0.1.0", "480x640 ?", "observation/front_rgb", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/gripper_closedness_action:g", "", hz=10),
    "nyu_door_opening_surprising_effectiveness": Entry("0.1.0", "720x960 ?", "observation/image",
        "observation/natural_language_instruction",
        "action/world_vector:vvv action/rotation_delta:vvv action/gripper_closedness_action:g", "", hz=3),
    "viola": Entry("0.1.0", "224x224 ?", "observation/agentview_rgb", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/gripper_closedness_action:g:float32()",
        "observation/joint_states:7 observation/gripper_states:1", hz=20),
    "berkeley_autolab_ur5": Entry("0.1.0", "480x640 ?", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/gripper_closedness_action:g:float32()",
        "observation/robot_state:15", hz=5),
    "toto": Entry("0.1.0", "480x640 ?", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:uuu action/rotation_delta:uuu action/open_gripper:g:bool()", "observation/state:7", hz=30),
    "language_table": Entry("0.1.0", "360x640 jpeg", "observation/rgb", "observation/instruction:int32[512]", "action:dd",
        "observation/effector_translation:2", hz=10, offset=10),
    "stanford_hydra_dataset_converted_externally_to_rlds": Entry("0.1.0", "240x320 png", "observation/image",
        "language_instruction", "action:ddddddg", "observation/state:27", hz=10),
    "austin_buds_dataset_converted_externally_to_rlds": Entry("0.1.0", "128x128 png", "observation/image",
        "language_instruction", "action:ddddddg", "observation/state:24", hz=20),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Entry("0.1.0", "128x128 png", "observation/image",
        "language_instruction", "action:-*7,d*6,g,-", "observation/state:13", hz=3),
    "furniture_bench_dataset_converted_externally_to_rlds": Entry("0.1.0", "224x224 jpeg", "observation/image",
        "language_instruction", "action:d*3,g*5", "observation/state:35", hz=10),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/image",
        "language_instruction", "action:u*6,g,-", "observation/state:21", hz=2),
    "austin_sailor_dataset_converted_externally_to_rlds": Entry("0.1.0", "128x128 png", "observation/image",
        "language_instruction", "action:ddddddg", "observation/state:8", hz=20),
    "austin_sirius_dataset_converted_externally_to_rlds": Entry("0.1.0", "84x84 png", "observation/image",
        "language_instruction", "action:ddddddg", "observation/state:8", hz=20),
    "bc_z": Entry("0.1.0", "171x213 jpeg", "observation/image", "observation/natural_language_instruction",
        "action/future/xyz_residual:d*3,-*27 action/future/axis_angle_residual:d*3,-*27 action/future/target_close:g,-*9:int64",
        "observation/present/xyz:3 observation/present/axis_angle:3 observation/present/sensed_close:1", hz=10),
    "dlr_edan_shared_control_converted_externally_to_rlds": Entry("0.1.0", "360x640 png", "observation/image",
        "language_instruction", "action:d*6,g", "observation/state:7", hz=5),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Entry("0.1.0", "360x640 png", "observation/image",
        "language_instruction", "action:u*3,g*5", "observation/state:20", hz=20),
    "utaustin_mutex": Entry("0.1.0", "128x128 png", "observation/image", "language_instruction", "action:ddddddg",
        "observation/state:24", hz=20),
    "berkeley_fanuc_manipulation": Entry("0.1.0", "224x224 png", "observation/image", "language_instruction", "action:dddddd",
        "observation/end_effector_state:7 observation/state:13", hz=10),
    "cmu_stretch": Entry("0.1.0", "128x128 png", "observation/image", "language_instruction", "action:u*6,g,-",
        "observation/state:4", hz=10),
    "cmu_play_fusion": Entry("0.1.0", "128x128 png", "observation/image", "language_instruction", "action:d*3,g*5,-",
        "observation/state:8", hz=5),
    "droid": Entry("1.0.1", "180x320 jpeg", "observation/exterior_image_1_left",
        "language_instruction language_instruction_2 language_instruction_3",
        "action_dict/cartesian_velocity:vvvvvv:float64 action_dict/gripper_position:g:float64",
        "observation/cartesian_position:6:float64 observation/gripper_position:1:float64", hz=15),
    "fmb": Entry("0.0.1", "256x256 jpeg", "observation/image_side_1", "language_instruction", "action:d*6,g",
        "observation/eef_pose:7 observation/state_gripper_pose:1:float32()", hz=10),
    "dobbe": Entry("0.0.1", "256x256 jpeg", "observation/wrist_image", "language_instruction", "action:u*6,g",
        "observation/state:7", hz=3.75),
    "robo_set": Entry("0.0.1", "240x424 jpeg", "observation/image_left", "language_instruction", "action:u*7,g",
        "observation/state:8", hz=5),
    "columbia_cairlab_pusht_real": Entry("0.1.0", "240x320 ?", "observation/image", "observation/natural_language_instruction",
        "action/world_vector:ddd action/rotation_delta:ddd action/gripper_closedness_action:g:float32()",
        "observation/robot_state:2", hz=10),
    "asu_table_top_converted_externally_to_rlds": Entry("0.1.0", "224x224 png", "observation/image", "language_instruction",
        "action:p*6,g", "ground_truth_states/EE:6 observation/state:7", hz=12.5),
    "berkeley_gnm_cory_hall": Entry("0.1.0", "64x85 png", "observation/image", "language_instruction", "action:dd:float64",
        "observation/state:3:float64", hz=5),
    "berkeley_gnm_recon": Entry("0.1.0", "120x160 png", "observation/image", "language_instruction", "action:dd:float64",
        "observation/state:3:float64", hz=3),
    "berkeley_gnm_sac_son": Entry("0.1.0", "120x160 png", "observation/image", "language_instruction", "action:dd:float64",
        "observation/state:3:float64", hz=10),
    "berkeley_mvp_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/hand_image",
        "language_instruction", "action:d*7,g", "observation/pose:7 observation/gripper:1:bool()", hz=5),
    "berkeley_rpt_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/hand_image",
        "language_instruction", "action:d*7,g", "observation/joint_pos:7 observation/gripper:1:bool()", hz=30),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/highres_image",
        "language_instruction", "action:u*6,g,-", "", hz=10),
    "cmu_playing_with_food": Entry("1.0.0", "480x640 png", "observation/image", "language_instruction", "action:p*3,g*5",
        "observation/state:6", hz=15),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/image",
        "language_instruction", "action:d*6,u", "observation/state:12", hz=10),
    "dlr_sara_pour_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/image",
        "language_instruction", "action:u*6,g", "observation/state:6", hz=10),
    "imperialcollege_sawyer_wrist_cam": Entry("0.1.0", "64x64 png", "observation/image", "language_instruction",
        "action:d*6,g,-", "observation/state:1", hz=10),
    "kaist_nonprehensile_converted_externally_to_rlds": Entry("0.1.0", "480x640 png", "observation/image",
        "language_instruction", "action:d*6,-*14", "observation/state:21", hz=10),
    "maniskill_dataset_converted_externally_to_rlds": Entry("0.1.0", "256x256 png", "observation/image",
        "language_instruction", "action:ddddddg", "observation/tcp_pose:7 observation/state:18", hz=20),
    "nyu_rot_dataset_converted_externally_to_rlds": Entry("0.1.0", "84x84 png", "observation/image",
        "language_instruction", "action:d*3,u*3,g", "observation/state:7", hz=3),
    "robo_net": Entry("0.1.0", "240x320 jpeg", "observation/image", "language_instruction", "action:d*4,g",
        "observation/state:5", hz=1, offset=10),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": Entry("0.1.0", "128x128 png", "observation/image",
        "language_instruction", "action:u*4",
        "observation/ee_position:3 observation/ee_orientation:4 observation/state:8", hz=20),
    "stanford_mask_vit_converted_externally_to_rlds": Entry("0.1.0", "480x480 png", "observation/image",
        "language_instruction", "action:d*4,g", "observation/end_effector_pose:5", hz=0),
    "stanford_robocook_converted_externally_to_rlds": Entry("0.1.0", "256x256 jpeg", "observation/image_1",
        "language_instruction", "action:v*7", "observation/state:7", hz=5),
    "tokyo_u_lsmo_converted_externally_to_rlds": Entry("0.1.0", "120x120 png", "observation/image", "language_instruction",
        "action:u*6,g", "observation/state:13", hz=10),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": Entry("0.1.0", "224x224 png", "observation/image",
        "language_instruction", "action:v*3,g", "observation/state:7", hz=3),
    "uiuc_d3field": Entry("0.1.0", "360x640 png", "observation/image_1", "language_instruction", "action:ddd",
        "observation/state:16", hz=1),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": Entry("0.1.0", "128x128 png", "observation/image",
        "language_instruction", "action:u*6,g,-", "observation/state:7", hz=10),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": Entry("0.1.0", "128x128 png", "observation/image",
        "language_instruction", "action:u*6,g,-", "observation/state:7", hz=10),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": Entry("0.1.0", "256x256 png", "observation/image",
        "language_instruction", "action:u*6,g,u*6,g", "observation/pose_l:6 observation/pose_r:6", hz=10),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": Entry("0.1.0", "224x224 png", "observation/image",
        "language_instruction", "action:p*6,g", "observation/end_effector_pose:6", hz=10),
    "spoc": Entry("0.0.1", "224x384 jpeg", "observation/image", "language_instruction", "action:u*9",
        "observation/last_agent_location:6 observation/relative_arm_location_metadata:4", hz=10),
    "tidybot": Entry("0.0.1", "360x640 jpeg", "observation/image", "language_instruction", "", "", hz=0),
    "vima_converted_externally_to_rlds": Entry("0.0.1", "128x256 raw", "observation/image", "multimodal_instruction",
        "action/pose0_position:ppp action/pose0_rotation:gggg action/pose1_position:ppp action/pose1_rotation:gggg", "", hz=0),
}
_RLDS = "_converted_externally_to_rlds"
MIXES = {                                                       # Source: Octo and OpenVLA; oxe29: 29 datasets alike
    "rtx": "fractal20220817_data:0.5409,kuka:0.8341,bridge_orig,taco_play:2,jaco_play:2,berkeley_cable_routing:3,roboturk,"
           "viola:2,berkeley_autolab_ur5,toto",
    "oxe_magic_soup": f"fractal20220817_data:0.5409,kuka:0.8341,bridge_orig,taco_play:2,jaco_play,berkeley_cable_routing,"
           f"roboturk:2,viola:2,berkeley_autolab_ur5:2,toto,language_table:0.1,stanford_hydra_dataset{_RLDS}:2,"
           f"austin_buds_dataset{_RLDS},nyu_franka_play_dataset{_RLDS}:3,furniture_bench_dataset{_RLDS}:0.1,"
           f"ucsd_kitchen_dataset{_RLDS}:2,austin_sailor_dataset{_RLDS},austin_sirius_dataset{_RLDS},"
           f"dlr_edan_shared_control{_RLDS},iamlab_cmu_pickup_insert{_RLDS},utaustin_mutex,berkeley_fanuc_manipulation:2,"
           f"cmu_stretch",
    "oxe_magic_soup_plus": "oxe_magic_soup,bc_z:0.2,fmb,dobbe:0.2,droid:0.06",
    "octo_magic_soup": "oxe_magic_soup,nyu_door_opening_surprising_effectiveness,bc_z:0.2",
    "oxe29": f"language_table,bridge,fractal20220817_data,robo_net,droid,berkeley_autolab_ur5,jaco_play,kuka,taco_play,"
           f"roboturk,bc_z,berkeley_cable_routing,columbia_cairlab_pusht_real,berkeley_fanuc_manipulation,uiuc_d3field,"
           f"ucsd_kitchen_dataset{_RLDS},ucsd_pick_and_place_dataset{_RLDS},furniture_bench_dataset{_RLDS},"
           f"maniskill_dataset{_RLDS},robo_set,stanford_hydra_dataset{_RLDS},stanford_robocook{_RLDS},spoc,tidybot,toto,"
           f"viola,vima{_RLDS},utaustin_mutex,fmb",
}


def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"data_oxe: {message}")


def reach(look, path: str):
    """look(path), for tf.io.gfile's exists and glob: a bucket out of reach is an error, not an absence."""
    try:
        return look(path)
    except tf.errors.OpError as error:
        fail(f"cannot reach '{path}' ({type(error).__name__}); check the network, the bucket's name in --data and your "
             f"credentials (gcloud auth application-default login), or copy the dataset to a local folder")


def find_entry(data: str, name: str) -> Entry:
    """The registry's entry, or the one that lies beside a dataset of one's own (DATA/NAME/VERSION/entry.json)."""
    if name in REGISTRY:
        return REGISTRY[name]
    own = sorted(reach(tf.io.gfile.glob, f"{data.rstrip('/')}/{name}/*/entry.json"))
    if not own:
        fail(f"unknown dataset '{name}': not in the registry (python data_oxe.py list), nor is there "
             f"'{data.rstrip('/')}/{name}/VERSION/entry.json'")
    try:
        return Entry(**json.loads(tf.io.gfile.GFile(own[-1]).read()))
    except (TypeError, ValueError) as error:
        fail(f"'{own[-1]}' is not an Entry: {error}")


def parse_mix(mix: str) -> dict[str, float]:
    """'bridge:0.7,language_table:0.3' or 'oxe29' or both -> {name: weight}; a missing weight is 1."""
    out = {}
    for part in mix.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            value = float(weight or 1.0)
        except ValueError:
            fail(f"weight '{weight}' of '{name}' in mix '{mix}' is not a number")
        if not 0 < value < float("inf"):
            fail(f"weight '{weight}' of '{name}' in mix '{mix}' must be above 0")
        for member, own in parse_mix(MIXES[name]).items() if name in MIXES else [(name, 1.0)]:
            if member in out:
                fail(f"dataset '{member}' stands twice in mix '{mix}'")
            out[member] = value * own
    return out


@cache
def columns_of(spec: str) -> list[tuple[str, str]]:
    """'action/xyz:d*3,- grip:g' -> [('action/xyz', 'ddd-'), ('grip', 'g')]; for states 'key:7' -> ('key', 'sssssss')."""
    out = []
    for part in spec.split():
        key, kinds, *_ = part.split(":")
        kinds = f"s*{kinds}" if kinds.isdigit() else kinds
        out.append((key, re.sub(r"(.)\*(\d+),?", lambda m: m[1] * int(m[2]), kinds).replace(",", "")))
    return out


def texts_of(entry: Entry) -> list[str]:
    """The keys of the instruction's variants."""
    return [part.split(":")[0] for part in entry.instruction.split()]


def kinds_of(spec: str) -> str:
    """The letters of all used dimensions, in order."""
    return "".join(kinds for _, kinds in columns_of(spec)).replace("-", "")


# ---------------------------------------------------------------------------------------------- planning, in Python
@dataclass
class Plan:
    """One dataset of the mix: which files, which episodes, which features. Made before any TensorFlow graph."""
    name: str
    entry: Entry
    offset: int                 # k, steps
    files: list[str]            # TFRecord files with at least one kept episode
    first: list[int]            # episode number of each file's first record
    records: list[int]          # number of records of each file
    keep: np.ndarray            # bool, (episodes in the split,)
    features: dict              # flat key -> TFDS feature (shape, dtype, encoding)
    pairs: float                # mean number of pairs an episode gives, from a look at a few
    frames: float               # estimated number of frames of the kept episodes, likewise
    pair_bytes: float           # encoded size of one frame pair, likewise
    counts: dict[str, int]      # true numbers of episodes: recorded, train, val, used


def open_builder(data: str, name: str, entry: Entry):
    """The dataset's folder DATA/NAME/VERSION as a TFDS builder; a local folder and gs:// alike."""
    path = f"{data.rstrip('/')}/{name}/{entry.version}"
    if not reach(tf.io.gfile.exists, f"{path}/features.json"):
        record = f", or record it: python rollout.py --record --data {data}" if name.startswith("metaworld") else ""
        fail(f"no dataset at '{path}' (features.json is missing); check --data '{data}', which should hold "
             f"NAME/VERSION{record}")
    return tfds.builder_from_directory(path)


def flat_features(builder) -> dict:
    """{'steps/observation/image': feature, ...} as TFDS writes an episode into a tf.train.Example."""
    out = {}

    def walk(prefix, feature):
        inner = feature.feature if isinstance(feature, tfds.features.Dataset) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            for key, value in inner.items():
                walk(f"{prefix}/{key}" if prefix else key, value)
        else:
            out[prefix] = inner
    walk("", builder.info.features)
    return out


def check_features(name: str, entry: Entry, features: dict):
    """The registry against the dataset's own features.json: every key there, of the declared width."""
    wanted = [(entry.image, None)] + [(key, None) for key in texts_of(entry)]
    for spec in (entry.action, entry.executed, entry.state):
        wanted += [(key, len(kinds)) for key, kinds in columns_of(spec)]
    for key, width in wanted:
        feature = features.get(f"steps/{key}")
        if feature is None:
            have = ", ".join(k.removeprefix("steps/") for k in features if k.startswith("steps/"))
            fail(f"dataset '{name}' has no step feature '{key}' in its features.json; it has: {have}")
        got = int(np.prod(feature.shape)) if width is not None else None
        if width is not None and got != width:
            fail(f"dataset '{name}': feature '{key}' is {got} wide, expected {width}")


def make_plan(data: str, name: str, split: str, horizon_s: float | None, pairs_per_episode: int, trim: tuple[int, int],
              val_fraction: float, holdout: str, max_episodes: int, episodes_per_task: int, rank: int, world: int) -> Plan:
    """Chooses episodes: val is the end of the split or what `holdout` matches, train the rest; subsets and ranks come
    after, out of train."""
    entry = find_entry(data, name)
    builder = open_builder(data, name, entry)
    features = flat_features(builder)
    check_features(name, entry, features)

    # the split 'train': TFDS knows the records of each shard, so nothing is counted by reading
    if "train" not in builder.info.splits:
        fail(f"dataset '{name}' has no split 'train'; it has: {', '.join(builder.info.splits)}")
    shards = builder.info.splits["train"].file_instructions
    starts = np.cumsum([0] + [s.take for s in shards])
    n = int(starts[-1])
    paths = [s.filename for s in shards]
    present = set(tf.io.gfile.listdir(str(builder.data_dir)))
    missing = [p for p in paths if os.path.basename(p) not in present]
    if missing:
        fail(f"{len(missing)} of {len(paths)} files of dataset '{name}' are missing, the first is '{missing[0]}'")
    known = np.ones(n, bool)
    if holdout:
        key, tilde, pattern = holdout.partition("~")
        if not tilde:
            fail(f"holdout '{holdout}' must be KEY~REGEX, such as instruction~drawer or episode_metadata/file_path~kitchen")
        values = episode_values(builder, paths, features, f"steps/{texts_of(entry)[0]}"
                                if key == "instruction" and entry.instruction else key)
        known = np.array([v is not None for v in values])       # an unreadable episode belongs to neither side
        try:
            held = np.array([bool(re.search(pattern, v or "")) for v in values])
        except re.error as error:
            fail(f"holdout '{holdout}': '{pattern}' is not a regular expression ({error})")
    else:
        held = np.arange(n) >= n - (max(1, round(n * val_fraction)) if n > 1 and val_fraction > 0 else 0)
    ids = np.flatnonzero((held if split == "val" else ~held) & known)
    counts = {"recorded": n, "train": int((~held & known).sum()), "val": int((held & known).sum())}
    if split == "train":
        if episodes_per_task:
            if not entry.instruction:
                fail(f"dataset '{name}' has no instructions to count --episodes-per-task by")
            texts = episode_values(builder, paths, features, f"steps/{texts_of(entry)[0]}")
            ids = first_per_task(name, texts, ids, episodes_per_task)
        if max_episodes:
            ids = ids[:max_episodes]
    counts["used"] = len(ids)
    if len(ids) < (world if split == "train" else 1):           # on all ranks alike
        fail(f"dataset '{name}' has {'no' if not len(ids) else len(ids)} episodes left in split '{split}' for {world} "
             f"processes: {n} recorded, {counts['train']} train and {counts['val']} val at "
             f"{f'holdout {holdout!r}' if holdout else f'val_fraction {val_fraction}'}, {counts['used']} used")
    if split == "train":
        ids = np.array_split(ids, world)[rank]                  # episode ranges: fewer shards than ranks do not matter
    keep = np.zeros(n, bool)
    keep[ids] = True
    used = [i for i in range(len(shards)) if keep[starts[i]:starts[i + 1]].any()]

    if horizon_s and not entry.hz:
        fail(f"the control frequency of '{name}' is not known, so horizon {horizon_s} s has no number of steps; leave the "
             f"horizon out ({entry.offset} steps) or put hz into its entry")
    offset = entry.offset if horizon_s is None else round(horizon_s * entry.hz)
    if offset < (horizon_s != 0):
        fail(f"horizon {horizon_s} s is {offset} steps of '{name}' at {entry.hz} Hz; give 0 or at least {1 / entry.hz:.3f}")
    lengths, sizes = glance(name, paths, f"steps/{entry.image}", features)
    usable = np.array(lengths) - offset - trim[0] - trim[1] - entry.first
    pairs = float(np.mean(np.minimum(np.maximum(usable, 0), pairs_per_episode or 1 << 30)))
    return Plan(name, entry, offset, [paths[i] for i in used], [int(starts[i]) for i in used],
                [int(shards[i].take) for i in used], keep, features, max(pairs, 1.0), float(np.mean(lengths)) * counts["used"],
                2 * float(np.mean(sizes)), counts)


def glance(name: str, paths: list[str], key: str, features: dict, episodes: int = 4) -> tuple[list[int], list[float]]:
    """Lengths and mean encoded image sizes of the first readable episodes; the same on every rank."""
    lengths, sizes = [], []
    for record in tf.data.TFRecordDataset(paths).ignore_errors().take(episodes):
        images, feature = tf.io.parse_single_example(record, {key: _parser(features[key])})[key], features[key]
        pixels = int(np.prod([x or 1 for x in feature.shape]))
        encoded = images.dtype == tf.string
        lengths.append(len(images) if encoded else len(images) // pixels)
        sizes.append(float(tf.reduce_mean(tf.strings.length(images))) if encoded else float(pixels))
    if not any(lengths):
        fail(f"dataset '{name}' has no readable episode in its {len(paths)} files, the first is '{paths[0]}'")
    return lengths, sizes


def episode_values(builder, paths: list[str], features: dict, key: str) -> list[str | None]:
    """A feature of every episode as text, of a step feature its first step's; None where the record is unreadable. Reads
    the dataset once, then remembers it, unless something was unreadable."""
    if key not in features:
        fail(f"dataset '{builder.name}' has no feature '{key}' in its features.json; it has: {', '.join(features)}")
    cached, remember = side_file(builder, f"values_{re.sub(r'[^a-z_]+', '_', key)}", key=key)
    if cached is not None:
        return cached
    width = int(np.prod(features[key].shape))

    @plainly
    def value(record):
        x = tf.io.parse_single_example(record, {key: _parser(features[key])})[key][:width]
        return tf.strings.reduce_join(_text(x) if x.dtype == tf.string or width > 1 else tf.strings.as_string(x))
    from tqdm import tqdm
    values = []
    shards = builder.info.splits["train"].file_instructions
    for path, shard in tqdm(list(zip(paths, shards)), desc=f"{builder.name}: {key}", unit="file", disable=None):
        found = tf.data.TFRecordDataset(path).ignore_errors().map(value).as_numpy_iterator()
        found = [x.decode("utf-8", "replace") for x in found]
        values += found + [None] * (shard.take - len(found))    # the reader will report these
    if None not in values:
        remember(values)
    return values


def side_file(builder, what: str, **depends):
    """-> (content or None, function that writes it): JSON beside the data, or in ~/.cache/nanolapa where that cannot be
    written. It counts as long as its fingerprint (the split's size and shards, and `depends`) is that of the data."""
    split = builder.info.splits["train"]
    fingerprint = dict(bytes=split.num_bytes, shards=split.shard_lengths, **depends)
    here = f"{builder.data_dir}/nanolapa_{what}.json"
    home = Path.home() / f".cache/nanolapa/{builder.name}-{builder.version}-{what}.json"

    def write(content):
        text = json.dumps({"fingerprint": fingerprint, "content": content})
        try:
            with tf.io.gfile.GFile(f"{here}.{os.getpid()}.partial", "w") as f:
                f.write(text)
            tf.io.gfile.rename(f"{here}.{os.getpid()}.partial", here, overwrite=True)
        except tf.errors.OpError:
            home.parent.mkdir(parents=True, exist_ok=True)
            partial = home.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(text)
            partial.rename(home)
    for path in (here, str(home)):
        if tf.io.gfile.exists(path):
            saved = json.loads(tf.io.gfile.GFile(path).read())
            if saved["fingerprint"] == fingerprint:
                return saved["content"], write
    return None, write


def first_per_task(name: str, texts: list[str], ids: np.ndarray, per_task: int) -> np.ndarray:
    """The first `per_task` of the episodes `ids` of each instruction."""
    seen, out = {}, []
    for i in ids:
        if texts[i] is None:
            continue
        seen[texts[i]] = seen.get(texts[i], 0) + 1
        if seen[texts[i]] <= per_task:
            out.append(i)
    short = {t: c for t, c in seen.items() if c < per_task}
    if short:
        fail(f"dataset '{name}' has fewer than {per_task} training episodes of some tasks: {short}")
    return np.asarray(out)


# ---------------------------------------------------------------------------------------------- reading, in TensorFlow
def _key(seed: int, purpose, counter):
    """Seed of a stateless random op; different purposes never share numbers, nor do seeds below 2**32."""
    return tf.stack([tf.constant(seed, tf.int64) + tf.cast(purpose, tf.int64) * (1 << 32), tf.cast(counter, tf.int64)])


plainly = tf.autograph.experimental.do_not_convert              # no rewriting of Python: tracing 29 datasets takes a third
FAULTS = ("", "the record is unreadable (file truncated, corrupt or out of reach)", "the episode is shorter than a frame pair",
          "the instruction is empty", "an action or state is not finite", "an image does not decode")


def _parser(feature):
    """How one step feature lies in the episode's tf.train.Example: T strings, or T * width floats or integers."""
    dtype = tf.as_dtype(feature.get_serialized_info().np_dtype)
    wire = tf.string if dtype == tf.string else tf.float32 if dtype.is_floating else tf.int64
    return tf.io.FixedLenSequenceFeature([], wire, allow_missing=True)


def _raw(x, feature):
    """Undoes TFDS's byte or ZLIB encoding of a tensor feature (kuka): strings (n,) -> (n, *shape)."""
    if x.dtype != tf.string:
        return x
    if feature._encoding.name == "ZLIB":                        # the one fact that TFDS keeps in no public attribute
        x = tf.io.decode_compressed(x, "ZLIB")
    return tf.reshape(tf.io.decode_raw(x, tf.as_dtype(feature.np_dtype)), [-1, *feature.shape])


def _text(x):
    """Instruction as bytes, or as language_table's zero-padded Unicode code points int (512,)."""
    if x.dtype == tf.string:
        return x
    x = tf.cast(x, tf.int32)
    return tf.strings.unicode_encode(tf.boolean_mask(x, x > 0), "UTF-8")


def _columns(parsed: dict, spec: str, features: dict, T):
    """Concatenates the features that a spec names, less the dropped dimensions: (T, width)."""
    parts = []
    for key, kinds in columns_of(spec):
        x = tf.reshape(tf.cast(_raw(parsed[f"steps/{key}"], features[f"steps/{key}"]), tf.float32), [T, len(kinds)])
        used = [i for i, kind in enumerate(kinds) if kind != "-"]
        parts.append(x if len(used) == len(kinds) else tf.gather(x, used, axis=1))
    return (tf.concat(parts, 1) if len(parts) > 1 else parts[0]) if parts else tf.zeros([T, 0])


def _parse(plan: Plan, index: int, A: int, Ds: int, seed: int):
    """-> fn(draw, (episode number, record)) -> one episode in the form common to all datasets: dataset, draw, episode,
    images (T,) encoded, instruction, actions (T, A), executed actions (T, A), states (T, Ds)."""
    entry, features = plan.entry, plan.features
    specs = entry.action, entry.executed or entry.action, entry.state
    keys = {entry.image, *texts_of(entry), *(key for spec in specs for key, _ in columns_of(spec))}
    wire = {f"steps/{key}": _parser(features[f"steps/{key}"]) for key in keys}
    wide = lambda x, width: x if x.shape[1] == width else tf.pad(x, [[0, 0], [0, width - x.shape[1]]])

    widths = {key: int(np.prod(features[key].shape)) if at.dtype != tf.string else 1 for key, at in wire.items()}
    image = f"steps/{entry.image}"

    def common(parsed, draw, T):
        images, feature = parsed[image], features[image]
        if not isinstance(feature, tfds.features.Image):                                    # raw pixels: as PNG from here on
            images = tf.io.encode_png(tf.reshape(tf.cast(_raw(images, feature), tf.uint8), [T, *feature.shape]), 0)
        texts = [tf.strings.strip(tf.strings.reduce_join(_text(parsed[key][:widths[key]])))  # of the first step
                 for key in (f"steps/{x}" for x in texts_of(entry))]
        text = texts[0] if texts else tf.constant("")
        if len(texts) > 1:                                                                  # any of the variants that are there
            texts = tf.boolean_mask(texts, tf.not_equal(texts, ""))
            pick = tf.random.stateless_uniform([], _key(seed, 20_000 + index, draw), 0, tf.maximum(tf.size(texts), 1), tf.int32)
            text = tf.concat([texts, [""]], 0)[pick]
        action, executed, state = (_columns(parsed, spec, features, T) for spec in specs)
        return images, text, wide(action, A), wide(executed, A), wide(state, Ds)

    @plainly
    def parse(draw, item):
        episode, record = item
        parsed = tf.io.parse_single_example(record, wire)
        T = tf.size(parsed[image]) // widths[image]
        whole = tf.reduce_all(tf.equal(tf.stack([tf.size(parsed[key]) for key in wire]), tf.constant([*widths.values()]) * T))
        nothing = tf.zeros([0], tf.string), tf.constant(""), tf.zeros([0, A]), tf.zeros([0, A]), tf.zeros([0, Ds])
        episode_parts = tf.cond(whole, lambda: common(parsed, draw, T), lambda: nothing)     # lengths disagree: unreadable
        return tf.constant(index, tf.int64), draw, episode, *episode_parts
    return parse


def _records(plans: list[Plan], seed: int, open_files: int):
    """-> fn(dataset, draw) -> (draw, (episode, record)) of one dataset, endless, from its draw-th kept episode on. In each
    epoch the files come in a fresh order, `open_files` at a time and in turn. Unreadable records come as empty ones, so
    that every file gives what the plan counted. One traced function serves all datasets, by tables."""
    kept = [np.flatnonzero(p.keep[a:a + n]) for p in plans for a, n in zip(p.first, p.records)]     # within each file
    low, span = np.array([[k[0], k[-1] + 1 - k[0]] for k in kept]).T
    scattered = any(len(k) < n for k, n in zip(kept, span))
    counts = np.array([len(p.files) for p in plans])
    base, groups = np.cumsum(counts) - counts, -(-counts // open_files)
    before = np.cumsum([0] + [len(p.keep) for p in plans])[:-1]
    files = tf.constant([f for p in plans for f in p.files])
    low_, span_, keep = tf.constant(low), tf.constant(span), tf.constant(np.concatenate([p.keep for p in plans]))
    first = tf.constant(low + np.concatenate([p.first for p in plans]))
    counts_, base_, groups_, before_ = (tf.constant(x) for x in (counts, base, groups, before))

    def order(d, epoch):
        shuffled = tf.random.experimental.stateless_shuffle(tf.range(counts_[d]), _key(seed, 10_000 + d, epoch))
        return base_[d] + shuffled

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)] * 4, autograph=False)
    def stream(d, group, into, draw):
        def file(i):                                            # not parallel: that costs gigabytes in a mix
            found = tf.data.TFRecordDataset(files[i], buffer_size=0).ignore_errors()            # 0: no second copy
            found = found.concatenate(tf.data.Dataset.from_tensors("").repeat()).skip(low_[i]).take(span_[i])
            found = found.enumerate(first[i])
            return found.filter(plainly(lambda episode, record: keep[before_[d] + episode])) if scattered else found

        def members(i):
            g = i % groups_[d]
            chosen = order(d, i // groups_[d])[g * open_files:(g + 1) * open_files]
            return tf.data.Dataset.from_tensor_slices(chosen).interleave(plainly(file), cycle_length=open_files)
        return tf.data.Dataset.range(group, 1 << 40).flat_map(plainly(members)).skip(into).enumerate(draw)

    def start(d, draw):
        sizes = np.array([len(k) for k in kept])
        epoch, into = divmod(draw, int(sizes[base[d]:base[d] + counts[d]].sum()))
        ends = np.cumsum(sizes[order(d, tf.constant(epoch, tf.int64)).numpy()])
        ends = ends[[min((g + 1) * open_files, counts[d]) - 1 for g in range(groups[d])]]       # episodes to each group's end
        g = int(np.searchsorted(ends, into, side="right"))
        return stream(d, epoch * groups[d] + g, into - (int(ends[g - 1]) if g else 0), draw)
    return start


def _picture(encoded, size: int, largest: int, native: bool):
    """One encoded frame -> (size, size, 3), or as decoded if `native`. JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8
    that covers `size`, which skips work; resizing is bilinear, by area where a picture shrinks to half or less."""
    decode = lambda: tf.ensure_shape(tf.io.decode_image(encoded, channels=3, expand_animations=False), [None, None, 3])
    ratios = [r for r in (1, 2, 4, 8) if largest >= size * r]                               # what the mix's pictures allow
    if len(ratios) > 1:
        def jpeg():
            ratio = tf.maximum(tf.reduce_min(tf.io.extract_jpeg_shape(encoded)[:2]) // size, 1)
            return tf.switch_case(tf.searchsorted(ratios, [ratio], side="right")[0] - 1,
                                  [lambda r=r: tf.io.decode_jpeg(encoded, channels=3, ratio=r) for r in ratios])
        image = tf.cond(tf.equal(tf.strings.substr(encoded, 0, 3), b"\xff\xd8\xff"), jpeg, decode)
    else:
        image = decode()                                                                    # finds out the format itself
    if native:
        return image
    height, width = tf.unstack(tf.shape(image)[:2])

    def resized():
        shrinks = tf.minimum(height, width) >= 2 * size
        image4 = image[None]
        scaled = tf.cond(shrinks, lambda: tf.image.resize(image4, (size, size), "area"),
                         lambda: tf.image.resize(tf.cast(image4, tf.float32), (size, size), "bilinear"))    # faster than uint8
        return tf.cast(scaled[0] + 0.5, tf.uint8)
    right = tf.logical_and(tf.equal(height, size), tf.equal(width, size))
    return tf.ensure_shape(tf.cond(right, lambda: image, resized), (size, size, 3))


class Loader:
    """Endless iterator of batches (module docstring). Deterministic by seed; `iter()` starts at the position.

    data: folder or gs:// bucket that holds NAME/VERSION; mix: 'name:weight,...', names of datasets or of MIXES; weights:
    'given' in the mix, 'equal', or 'proportionate' to the datasets' estimated frames. split: 'train' or 'val'.
    batch_size: of this rank. image_size: of square frames; 0 leaves out `frames`, for statistics; resize 'gpu' hands
    over the decoded size and leaves resizing to to(). horizon_s: seconds between the frames (None: each dataset's own
    offset; 0: the same frame twice, for policies). pairs_per_episode: random ones, spread over the episode; 0: all.
    trim: steps left out at an episode's start and end. min_motion: drops pairs whose 16x16 thumbnails differ by less,
    mean absolute difference in grey levels. val_fraction: end of each dataset that is val; holdout 'KEY~REGEX': instead
    the episodes whose feature KEY (or 'instruction') matches, to validate on unseen scenes or tasks. max_episodes and
    episodes_per_task (of equal instruction) are subsets of train. max_bad: share of bad episodes (FAULTS) to skip, each
    with a warning, before stopping. Ranks get disjoint episodes of train; val is the same on every rank.
    Errors of data and arguments exit with one line.
    """

    def __init__(self, data: str, mix: str, split: str, batch_size: int, image_size: int, *, chunk: int = 1,
                 weights: str = "given", resize: str = "cpu", horizon_s: float | None = None, pairs_per_episode: int = 8,
                 trim: tuple[int, int] = (0, 0), min_motion: float = 0.0, need_instruction: bool = True,
                 val_fraction: float = 0.1, holdout: str = "", max_episodes: int = 0, episodes_per_task: int = 0,
                 max_bad: float = 0.001, shuffle_mb: float = 64.0, threads: int = 2, seed: int = 0, rank: int = 0,
                 world: int = 1):
        arguments = {k: v for k, v in locals().items() if k not in ("self", "data", "threads", "max_bad")}
        if resize not in ("cpu", "gpu") or weights not in ("given", "equal", "proportionate"):
            fail(f"resize '{resize}' must be cpu or gpu, weights '{weights}' given, equal or proportionate")
        if min(pairs_per_episode, max_episodes, episodes_per_task, *trim) < 0 or min(batch_size, threads, chunk) < 1:
            fail(f"pairs_per_episode {pairs_per_episode}, trim {trim}, max_episodes {max_episodes} and episodes_per_task "
                 f"{episodes_per_task} must not be negative, batch_size {batch_size} and chunk {chunk} at least 1")
        if not 0 <= max_bad <= 1 or not 0 <= val_fraction < 1:
            fail(f"max_bad {max_bad} and val_fraction {val_fraction} are shares, from 0 to 1")
        if min_motion and (not image_size or horizon_s == 0):
            fail(f"min_motion {min_motion} needs pictures of two moments; image_size is {image_size}, horizon_s {horizon_s}")
        given = parse_mix(mix)
        self.plans = [make_plan(data, n, split, horizon_s, pairs_per_episode, trim, val_fraction, holdout, max_episodes,
                                episodes_per_task, rank, world) for n in given]
        self.names, self.batch_size, self.image_size, self.resize = tuple(given), batch_size, image_size, resize
        self.chunk, self.pairs_per_episode, self.trim, self.threads = chunk, pairs_per_episode, trim, threads
        self.min_motion, self.need_instruction, self.max_bad = min_motion, need_instruction, max_bad
        entries = [p.entry for p in self.plans]
        self.action_dim = max(len(kinds_of(e.action)) for e in entries)
        self.state_dim = max(len(kinds_of(e.state)) for e in entries)
        letters = [kinds_of(e.executed or e.action) for e in entries]
        self.motion_dims = [i for i in range(self.action_dim) if any(x[i:i + 1] in "dpv" and x[i:] for x in letters)]
        self.horizon = {p.name: {"steps": p.offset, "seconds": p.offset / p.entry.hz if p.entry.hz else None}
                        for p in self.plans}
        self.counts = {p.name: p.counts for p in self.plans}
        self.source_size = {p.name: p.features[f"steps/{p.entry.image}"].shape[0] for p in self.plans}  # recorded height
        self._bad, self._undecodable, self._lock = {}, set(), threading.Lock()
        self._pipeline = None, None

        share = {"given": list(given.values()), "equal": [1.0] * len(given), "proportionate": [p.frames for p in self.plans]}
        per_draw = np.array(share[weights]) / [p.pairs for p in self.plans]     # weights are of pairs, draws give several
        self.share = dict(zip(given, (np.array(share[weights]) / np.sum(share[weights])).tolist()))
        self._chance = np.cumsum(per_draw / per_draw.sum()).astype(np.float32)[:-1]
        draw_bytes = np.average([p.pairs * p.pair_bytes for p in self.plans], weights=per_draw)
        episodes = [int(p.keep.sum()) for p in self.plans]
        self.block = max(1, min(int(shuffle_mb * 1e6 / 2 / draw_bytes), sum(episodes)))     # Q; the next one is read meanwhile
        self.seed = seed + 1_000_003 * rank if split == "train" else seed
        self._identity = {"world": world, "rank": rank, **arguments, "trim": list(trim), "block": self.block,
                          "episodes": episodes, "chosen": zlib.crc32(b"".join(p.keep.tobytes() for p in self.plans))}
        self._position = (0, 0)                                                 # block, pairs taken of it
        self._drawn = (0, np.zeros(len(given), int))                            # block, draws of each dataset before it
        if min_motion:                                                          # a filter that nothing passes would never end
            sample = self._encoded((0, 0)).take(256).map(plainly(self._decode), num_parallel_calls=threads)
            if not any(item[5].numpy() for item in sample):
                fail(f"none of the first 256 pairs moves by min_motion {min_motion} grey levels")

    def _report(self, index, episode, fault):
        """A reader met a bad episode: warns once for each, stops beyond max_bad. Called from tf.data's threads."""
        plan, key = self.plans[index], (int(index), int(episode))
        with self._lock:
            if key not in self._bad:
                file = int(np.searchsorted(plan.first, episode, side="right")) - 1
                where = f"{plan.files[file]}, record {episode - plan.first[file]}, episode {episode} of {plan.name}"
                span = f" of {plan.offset + 1} steps" if fault == 2 else ""
                self._bad[key] = f"{where}: {FAULTS[fault]}{span}"
                print(f"data_oxe: skipped {'a pair of ' if fault == 5 else ''}{self._bad[key]}", file=sys.stderr, flush=True)
            return np.int32(-1 if self._too_bad() else 0)       # -1 pairs: an error that ends the pipeline

    def _choices(self, block):
        """Which dataset each draw of a block comes from: (Q,) int64, a function of the seed and the block alone. Evenly
        spaced points in a random order, so that every block holds the weights, not only the long run."""
        seed = _key(self.seed, 1, block)
        order = tf.random.experimental.stateless_shuffle(tf.range(self.block), seed)
        u = (tf.cast(order, tf.float32) + tf.random.stateless_uniform([], seed)) / self.block
        return tf.searchsorted(tf.constant(self._chance), u, side="right", out_type=tf.int64)

    def _draws_before(self, block: int) -> np.ndarray:
        at, drawn = self._drawn if self._drawn[0] <= block else (0, np.zeros(len(self.plans), int))
        for b in range(at, block):
            drawn = drawn + np.bincount(self._choices(tf.constant(b, tf.int64)).numpy(), minlength=len(self.plans))
        return drawn

    def _sampler(self):
        """-> fn(episode in the common form) -> its n encoded pairs: frames t (n,), frames t+k (n,), instruction (n,),
        floats (n, C*A + A + Ds), ints (n, 4) = dataset, episode, t, steps left. n is 0 for a bad episode."""
        plans, C, A, N = self.plans, self.chunk, max(1, self.action_dim), self.pairs_per_episode  # tf.data breaks at width 0
        table = lambda of: tf.constant([of(p) for p in plans])
        offset, has_text = table(lambda p: p.offset), table(lambda p: bool(p.entry.instruction) and self.need_instruction)
        skip, cut = table(lambda p: p.entry.first + self.trim[0]), self.trim[1]

        factor = {how: np.zeros((len(plans), A), np.float32) for how in ("summed", "last", "change")}
        for i, plan in enumerate(plans):
            for j, c in enumerate(kinds_of(plan.entry.executed or plan.entry.action)):
                factor[{"d": "summed", "v": "summed", "p": "change"}.get(c, "last")][i, j] = \
                    1 / plan.entry.hz if c == "v" and plan.entry.hz else 1.0
        factor = {how: tf.constant(x) for how, x in factor.items() if x.any()}              # (datasets, A)

        @plainly
        def sample(d, draw, episode, images, text, action, executed, state):
            k, T = offset[d], tf.shape(images)[0]
            usable = T - k - skip[d] - cut                                                  # starts t with t+k < T
            empty = tf.logical_and(tf.equal(text, ""), has_text[d])
            finite = tf.math.is_finite(tf.reduce_sum(action) + tf.reduce_sum(executed) + tf.reduce_sum(state))
            fault = tf.where(T == 0, 1, tf.where(usable <= 0, 2, tf.where(empty, 3, tf.where(finite, 0, 4))))
            usable = tf.cond(fault > 0, lambda: tf.ensure_shape(tf.numpy_function(
                self._report, [d, episode, fault], tf.int32), []), lambda: usable)          # 0: no pairs of this one
            if N:                                                                           # one in each nth of the episode
                n = tf.minimum(usable, N)
                u = tf.range(tf.cast(n, tf.float32)) + tf.random.stateless_uniform([n], _key(self.seed, 100 + d, draw))
                u *= tf.cast(usable, tf.float32) / tf.cast(tf.maximum(n, 1), tf.float32)
                t = skip[d] + tf.minimum(tf.cast(u, tf.int32), usable - 1)                  # (n,)
            else:
                n, t = usable, skip[d] + tf.range(usable)
            at = t[:, None] + tf.range(C)[None]                                             # (n, C)
            chunks = tf.reshape(tf.gather(action, tf.minimum(at, T - 1)), [n, C * A])
            before = tf.pad(tf.cumsum(executed), [[1, 0], [0, 0]])                          # sum of steps < i
            value = {"summed": lambda: tf.gather(before, t + k) - tf.gather(before, t),
                     "last": lambda: tf.gather(executed, tf.maximum(t + k - 1, 0)),
                     "change": lambda: tf.gather(executed, t + k) - tf.gather(executed, t)}
            motion = sum((value[how]() * x[d] for how, x in factor.items()), tf.zeros([n, A]))
            ints = tf.stack([tf.fill([n], d), tf.fill([n], episode), tf.cast(t, tf.int64), tf.cast(T - t, tf.int64)], 1)
            return (tf.gather(images, t), tf.gather(images, t + k), tf.fill([n], text),
                    tf.concat([chunks, motion, tf.gather(state, t)], 1), ints)
        return sample

    def _encoded(self, position: tuple[int, int]):
        """The stream of encoded pairs from a position on: (block, (number in the block, pair as _sampler gives it))."""
        block, taken = position
        drawn, start = self._draws_before(block), _records(self.plans, self.seed, max(1, 8 // len(self.plans)))
        streams = [start(i, int(drawn[i])).map(_parse(p, i, max(1, self.action_dim), self.state_dim, self.seed))
                   for i, p in enumerate(self.plans)]
        blocks = tf.data.Dataset.range(block, 1 << 40)
        mixed = streams[0] if len(streams) == 1 else tf.data.Dataset.choose_from_datasets(
            streams, blocks.flat_map(plainly(lambda b: tf.data.Dataset.from_tensor_slices(self._choices(b)))))

        @plainly
        def shuffle(b, draws):                                  # encoded frames move through here, they are not copied
            seed = tf.random.stateless_uniform([], _key(self.seed, 2, b), None, None, tf.int64)
            pairs = tf.data.Dataset.zip(draws).unbatch()
            pairs = pairs.shuffle(tf.data.UNKNOWN_CARDINALITY, seed=seed, reshuffle_each_iteration=False)
            return tf.data.Dataset.zip(tf.data.Dataset.from_tensors(b).repeat(), pairs.enumerate())
        windows = mixed.map(self._sampler()).prefetch(self.block).window(self.block)         # the next block, meanwhile
        ds = tf.data.Dataset.zip(blocks, windows).flat_map(shuffle).skip(taken)
        if self._undecodable:
            bad = tf.constant(sorted(self._undecodable), tf.int64)
            ds = ds.filter(plainly(lambda block, pair: ~tf.reduce_any(tf.reduce_all(bad == tf.stack([block, pair[0]]), 1))))
        return ds

    def _decode(self, block, pair):
        """Last stage of the pipeline, in parallel: one encoded pair -> its frames."""
        number, (first, second, *rest) = pair
        if not self.image_size:
            return block, number, *rest
        native, same = self.resize == "gpu", all(p.offset == 0 for p in self.plans)
        shapes = [p.features[f"steps/{p.entry.image}"].shape or (None,) for p in self.plans]
        largest = max(4096 if None in shape else max(shape) for shape in shapes)
        frames = [_picture(x, self.image_size, largest, native) for x in ((first,) if same else (first, second))]
        frames = tf.stack(frames * 2 if same else frames)                       # (2, h, w, 3)
        moved = tf.constant(True)
        if self.min_motion:
            small = tf.image.resize(frames, (16, 16), "area")
            moved = tf.reduce_mean(tf.abs(small[1] - small[0])) >= self.min_motion
        return (block, number, *rest, moved, tf.shape(frames, tf.int64)[1:3],
                tf.reshape(frames, [-1]) if native else frames)

    def _tensors(self, position: tuple[int, int]):
        """The tf.data pipeline of batches from a position."""
        ds = self._encoded(position).map(plainly(self._decode), num_parallel_calls=self.threads)
        if self.image_size and self.min_motion:
            ds = ds.filter(plainly(lambda block, number, text, floats, ints, moved, *frames: moved))
        if self.image_size and self.resize == "gpu":                            # flat, as sizes may differ
            ds = ds.padded_batch(self.batch_size, drop_remainder=True)
        else:
            ds = ds.batch(self.batch_size, drop_remainder=True)
        return self._options(ds)

    def _options(self, ds):
        options = tf.data.Options()
        options.autotune.enabled = False                        # autotune grows buffers until memory ends
        options.deterministic = True
        options.experimental_optimization.apply_default_optimizations = False   # a second of graph rewriting, no gain
        options.threading.private_threadpool_size = self.threads
        options.threading.max_intra_op_parallelism = 1
        return ds.prefetch(2).with_options(options)

    def _unpack(self, block, number, text, floats, ints, moved=None, shape=None, frames=None) -> tuple[dict, tuple[int, int]]:
        """What the pipeline delivers -> (batch of the contract, position after it). Views, no copies."""
        B, C, A, a = len(ints), self.chunk, max(1, self.action_dim), self.action_dim
        batch = {"instruction": [s.decode("utf-8", "replace") for s in text],
                 "actions": floats[:, :C * A].reshape(B, C, A)[:, :, :a], "action_mask": np.arange(C) < ints[:, 3:],
                 "action_sum": floats[:, C * A:C * A + a], "state": floats[:, C * A + A:],
                 "dataset": ints[:, 0], "episode": ints[:, 1], "step": ints[:, 2],
                 "has_action": np.array([bool(p.entry.action) for p in self.plans])[ints[:, 0]]}
        if frames is not None and self.resize == "gpu":
            if (shape == shape[0]).all():
                frames = frames.reshape(B, 2, *shape[0], 3)
            else:
                frames = [x[:6 * h * w].reshape(2, h, w, 3) for x, (h, w) in zip(frames, shape)]
        if frames is not None:
            batch["frames"] = frames
        return batch, (int(block[-1]), int(number[-1]) + 1)

    def _batches(self, position: tuple[int, int]):
        """Endless (batch, position after it) from a position. An image that does not decode breaks the pipeline, which
        then starts again at the batch, without that pair: the price is paid by those who have such images."""
        while True:
            try:
                key = position, len(self._undecodable)
                if self._pipeline[0] != key:                    # kept, so that a validation set is not built each time
                    self._pipeline = key, self._tensors(position)
                for item in self._pipeline[1]:
                    batch, position = self._unpack(*(x._numpy() for x in item))     # numpy() would copy
                    yield batch, position
            except tf.errors.OpError as error:
                if not self._too_bad() and not self._blame(position):
                    fail(f"reading broke off after batch position {position}: {str(error).splitlines()[0]}")
            if self._too_bad():
                fail(f"{len(self._bad)} bad episodes of {self._episodes()}, more than max_bad {self.max_bad} allows; "
                     f"the last: {[*self._bad.values()][-1]}")

    def _blame(self, position: tuple[int, int]) -> bool:
        """Finds the next pairs that do not decode and reports their episodes: at least one, as a batch just failed on it."""
        known, ahead_of = len(self._undecodable), 4 * self.batch_size
        with contextlib.suppress(tf.errors.OpError):            # another fault of the stream: not an image's
            for pair in self._encoded(position):
                try:
                    self._decode(*pair)
                except tf.errors.InvalidArgumentError:
                    self._undecodable.add((int(pair[0]), int(pair[1][0])))
                    index, episode = pair[1][1][-1].numpy()[:2]
                    self._report(index, episode, 5)
                ahead_of -= len(self._undecodable) > known
                if ahead_of <= 0:
                    break
        return len(self._undecodable) > known

    def _episodes(self) -> int:
        return sum(self._identity["episodes"])

    def _too_bad(self) -> bool:
        return len(self._bad) > self.max_bad * self._episodes() or len(self._bad) >= self._episodes()

    def __iter__(self):
        for batch, position in self._batches(self._position):
            self._position = position
            yield batch

    def first(self, n: int):
        """The stream's first n batches, the same at every call; the position does not move. For validation."""
        return (batch for batch, _ in islice(self._batches((0, 0)), n))

    def to(self, device, more=None):
        """As `iter()`, with torch tensors on `device`: one thread reads, pins, sends and resizes the next batch meanwhile.
        more: fn(batch of arrays) -> further arrays of it, called in that thread."""
        import torch
        cuda = torch.device(device).type == "cuda"
        side = torch.cuda.Stream(device) if cuda else None      # copies do not queue behind the step's kernels

        def send(batch):
            with torch.cuda.stream(side) if cuda else contextlib.nullcontext():
                batch = to_device({**batch, **(more(batch) if more else {})}, device, self.image_size)
            if cuda:
                side.synchronize()
            return batch
        for batch, position in ahead(self._batches(self._position), send):
            for x in batch.values():
                if cuda and isinstance(x, torch.Tensor):
                    x.record_stream(torch.cuda.current_stream(device))
            self._position = position
            yield batch

    def state_dict(self) -> dict:
        """The position of the next batch and what the stream depends on: numbers only, a kilobyte."""
        drawn = self._draws_before(self._position[0])
        self._drawn = self._position[0], drawn
        return {"position": list(self._position), "drawn": drawn.tolist(), **self._identity}

    def load_state_dict(self, state: dict):
        """Continues after the batches of `state`; exits when the stream would be another one."""
        for key, value in self._identity.items():
            if state[key] != value:
                fail(f"cannot resume the data stream: {key} was {state[key]!r}, is {value!r}")
        self._position = tuple(state["position"])
        self._drawn = self._position[0], np.array(state["drawn"])


def to_device(batch: dict, device, image_size: int) -> dict:
    """The arrays of a batch as torch tensors on `device`, through pinned memory; frames uint8 (B, 2, S, S, 3). Frames of
    other sizes are resized there (bilinear, antialiased), so pictures cross the bus as recorded."""
    import torch
    device = torch.device(device)

    def send(x):
        x = torch.from_numpy(x)
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
    out = {k: send(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
    if isinstance(batch.get("frames"), list):
        frames = batch["frames"]
        out["frames"] = torch.empty(len(frames), 2, image_size, image_size, 3, dtype=torch.uint8, device=device)
        for shape in {x.shape for x in frames}:                 # one resize for all pairs of a size
            rows = [i for i, x in enumerate(frames) if x.shape == shape]
            out["frames"][rows] = fit(send(np.stack([frames[i] for i in rows])), image_size)
    elif "frames" in out:
        out["frames"] = fit(out["frames"], image_size)
    return out


def fit(frames, size: int):
    """uint8 tensor (..., H, W, 3) -> uint8 (..., size, size, 3), bilinear, antialiased; as it is if it fits already."""
    import torch
    if frames.shape[-3:-1] == (size, size):
        return frames
    x = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).reshape(*frames.shape[:-3], size, size, 3)


def ahead(batches, transform):
    """Runs `batches` (of (batch, position)) in one background thread, one transformed batch ahead of the consumer."""
    queue, stop = Queue(1), threading.Event()

    def put(item):
        while not stop.is_set():
            with contextlib.suppress(Full):
                return queue.put(item, timeout=0.1)

    def work():
        try:
            for batch, position in batches:
                put((transform(batch), position))
                if stop.is_set():
                    return
            put(StopIteration())
        except BaseException as error:                          # a fault's message belongs to the main thread
            put(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=30)                                 # it ends with the batch it is reading


# ---------------------------------------------------------------------------------------------- writing
SHARD = 24                      # episodes a file


class DatasetWriter:
    """Writes episodes as an RLDS dataset that `tfds.builder_from_directory` reads, with entry.json for find_entry().

    Everything goes to DATA/NAME/.VERSION.partial and is renamed on a clean exit, so a dataset is whole or absent. With
    `resume` an interrupted writer's finished shards are kept and added to.
    """

    def __init__(self, data: str, name: str, entry: Entry, features: dict, resume: bool = False):
        if "://" in data:
            fail(f"--data '{data}': datasets are written to a local folder; copy them to the bucket afterwards")
        self.final, self.entry, self.resume = Path(data) / name / entry.version, entry, resume
        self.partial = self.final.with_name(f".{self.final.name}.partial")
        if self.final.exists():
            fail(f"'{self.final}' exists already; remove it or write to another --data folder")
        if self.partial.exists() and not resume:
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=name, version=tfds.core.Version(entry.version), data_dir=str(self.partial), module_name="")
        info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features),
                                     description="Written by nanoLAPA.")
        self.writer = tfds.core.SequentialWriter(info, SHARD, overwrite=not resume)
        self.writer.initialize_splits(["train"], fail_if_exists=False)

    def __enter__(self):
        return self

    def write(self, example: dict):
        self.writer.add_examples({"train": [example]})

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.writer.close_all()
            (self.partial / "entry.json").write_text(json.dumps(asdict(self.entry), indent=1))
            self.partial.rename(self.final)
        elif not self.resume:
            shutil.rmtree(self.partial, ignore_errors=True)


class EpisodeWriter(DatasetWriter):
    """Episodes of the simulator, in the schema of the metaworld entries."""

    def __init__(self, data: str, name: str, image_size: int, action_dim: int, state_dim: int):
        f = tfds.features
        vector = lambda n: f.Tensor(shape=(n,), dtype=np.float32)
        super().__init__(data, name, REGISTRY[name], {
            "episode_metadata": {"task": f.Text(), "seed": np.int64, "success": np.bool_, "file_path": f.Text()},
            "steps": f.Dataset({
                "observation": {"image": f.Image(shape=(image_size, image_size, 3), encoding_format="png"),
                                "state": vector(state_dim)},
                "action": vector(action_dim), "executed_action": vector(action_dim), "language_instruction": f.Text(),
                "reward": np.float32, "discount": np.float32,
                "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_})})

    def add(self, images, state, action, executed_action, reward, instruction: str, *, task: str, seed: int,
            success: bool, file_path: str):
        """One episode: images T encoded PNGs (bytes) or uint8 (T, H, W, 3); state (T, Ds); actions (T, A); reward (T,)."""
        T = len(images)
        steps = [{"observation": {"image": images[t], "state": np.float32(state[t])},
                  "action": np.float32(action[t]), "executed_action": np.float32(executed_action[t]),
                  "language_instruction": instruction, "reward": np.float32(reward[t]), "discount": np.float32(1),
                  "is_first": t == 0, "is_last": t == T - 1, "is_terminal": bool(success and t == T - 1)}
                 for t in range(T)]
        self.write({"steps": steps, "episode_metadata": dict(task=task, seed=seed, success=success, file_path=file_path)})


# ---------------------------------------------------------------------------------------------- commands
def list_datasets(data: str = "data"):
    """The registry, which of it lies in the folder (or bucket) --data, and the mixes."""
    own = {path.split("/")[-3] for path in reach(tf.io.gfile.glob, f"{data.rstrip('/')}/*/*/entry.json")}
    for name in [*REGISTRY, *sorted(own - set(REGISTRY))]:
        entry, here = find_entry(data, name), "-"
        if reach(tf.io.gfile.exists, f"{data.rstrip('/')}/{name}/{entry.version}/features.json"):
            info = tfds.builder_from_directory(f"{data.rstrip('/')}/{name}/{entry.version}").info
            here = ", ".join(f"{k} {s.num_examples} episodes" for k, s in info.splits.items())
            here += f", {info.dataset_size / 1e6:.0f} MB"
        print(f"{name:59s} {entry.version}  {entry.frame:13s} {entry.hz:5.4g} Hz  pair {entry.offset:2d} steps  "
              f"action {len(kinds_of(entry.action)):2d}  state {len(kinds_of(entry.state)):2d}  {here}")
    for name in MIXES:
        print(f"mix {name}: {len(parse_mix(name))} datasets")


def describe(loader: Loader):
    """One line a dataset: true counts, pair offset, share of the mix."""
    for name, c in loader.counts.items():
        seconds = loader.horizon[name]["seconds"]
        print(f"{name}: {c['recorded']} episodes recorded, {c['train']} train, {c['val']} val, {c['used']} used; pairs "
              f"{loader.horizon[name]['steps']} steps ({'? s' if seconds is None else f'{seconds:.2f} s'}) apart; "
              f"{loader.share[name]:.1%} of the pairs")


def inspect(data: str = "data", mix: str = "metaworld_corner4", weights: str = "given", split: str = "train",
            holdout: str = "", horizon_s: float | None = None, image_size: int = 128, batches: int = 8, seed: int = 0,
            out: str = "runs/inspect"):
    """Prints counts, shapes and ranges of a mix; saves a histogram of every action dimension and a contact sheet."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    loader = Loader(data, mix, split, 32, image_size, chunk=8, weights=weights, holdout=holdout, horizon_s=horizon_s,
                    seed=seed)
    describe(loader)
    rows = list(loader.first(batches))
    for key in rows[0]:
        if key == "instruction":
            texts = sorted({s for b in rows for s in b[key]})
            print(f"{key:12s} {len(texts)} different in {32 * batches} samples: {texts[:8]}")
        else:
            x = np.concatenate([b[key] for b in rows])
            print(f"{key:12s} {str(x.dtype):8s} {str(x.shape):22s} min {x.min():.3g} mean {x.mean():.3g} max {x.max():.3g}")
    Path(out).mkdir(parents=True, exist_ok=True)

    index = np.concatenate([b["dataset"] for b in rows])
    values = {"action": np.concatenate([b["actions"][:, 0] for b in rows]),
              "action_sum": np.concatenate([b["action_sum"] for b in rows])}
    fig, axes = plt.subplots(2, max(1, loader.action_dim), figsize=(2.2 * max(1, loader.action_dim), 4.4), squeeze=False)
    for row, (label, x) in zip(axes, values.items()):
        for i, ax in enumerate(row[:x.shape[1]]):
            for d, plan in enumerate(loader.plans):
                kinds = kinds_of(plan.entry.action)
                if i < len(kinds) and (index == d).any():
                    ax.hist(x[index == d, i], 40, histtype="step", density=True, label=f"{plan.name[:18]} {kinds[i]}")
            ax.set_title(f"{label}[{i}]", fontsize=8)
            ax.set_yticks([])
            ax.tick_params(labelsize=6)
    if len(loader.plans) <= 6 and loader.action_dim:
        axes[0, 0].legend(fontsize=5)
    fig.tight_layout()
    fig.savefig(f"{out}/actions.png", dpi=90)

    fig, axes = plt.subplots(4, 6, figsize=(15, 8))
    b = rows[0]
    for i, ax in enumerate(axes.flat):
        ax.imshow(np.concatenate(b["frames"][i], axis=1))
        ax.set_axis_off()
        motion = np.abs(np.diff(b["frames"][i].astype(float), axis=0)).mean()
        moved = " ".join(f"{v:.2g}" for v in b["action_sum"][i, :3]) if b["has_action"][i] else "no action"
        ax.set_title(f"{loader.names[b['dataset'][i]][:30]} ep {b['episode'][i]} t {b['step'][i]}\n"
                     f"{b['instruction'][i][:40]}\nmean |difference| {motion:.1f}, sum {moved}", fontsize=7)
    fig.tight_layout()
    fig.savefig(f"{out}/contact_sheet.png", dpi=80)
    print(f"histogram of first actions and of action_sum: {out}/actions.png")
    print(f"contact sheet (frame t | frame t+k): {out}/contact_sheet.png")


def statistics(data: str, name: str) -> dict:
    """{'actions' | 'state': {'count', 'q01', 'q99', 'mean', 'std': list of one number a dimension}} of split 'train', the
    percentiles of at most two million random steps; read once, then cached beside the data (side_file)."""
    entry = find_entry(data, name)
    builder = open_builder(data, name, entry)
    features = flat_features(builder)
    check_features(name, entry, features)
    specs = {"actions": entry.action, "state": entry.state}
    cached, remember = side_file(builder, "statistics", **specs)
    if cached is not None:
        return cached
    from tqdm import tqdm
    wire = {f"steps/{key}": _parser(features[f"steps/{key}"]) for spec in specs.values() for key, _ in columns_of(spec)}
    rows, lost = {what: [] for what, spec in specs.items() if spec}, 0
    shards = builder.info.splits["train"].file_instructions

    @plainly
    def parse(record):
        parsed = tf.io.parse_single_example(record, wire)
        return {what: _columns(parsed, specs[what], features, -1) for what in rows}
    for shard in tqdm(shards if rows else (), desc=name, unit="file", disable=None):
        found = list(tf.data.TFRecordDataset(shard.filename).ignore_errors().map(parse).as_numpy_iterator())
        if len(found) < shard.take:
            print(f"data_oxe: {shard.take - len(found)} unreadable episodes in {shard.filename}", file=sys.stderr)
        for what in rows:
            x = np.concatenate([episode[what] for episode in found]) if found else np.zeros((0, len(kinds_of(specs[what]))))
            good = x[np.isfinite(x).all(1)].astype(np.float64)
            lost += len(x) - len(good)
            sample = good[np.random.default_rng(len(rows[what])).permutation(len(good))[:max(1000, 2_000_000 // len(shards))]]
            rows[what].append((len(good), good.sum(0), (good ** 2).sum(0), sample.astype(np.float32)))
    if lost:
        print(f"data_oxe: {name}: left out {lost} rows that are not finite", file=sys.stderr)
    out = {}
    for what, parts in rows.items():
        count, total, squares = (sum(p[i] for p in parts) for i in range(3))
        q01, q99 = np.percentile(np.concatenate([p[3] for p in parts]), [1, 99], axis=0)
        mean = total / count
        out[what] = dict(count=count, q01=q01.tolist(), q99=q99.tolist(), mean=mean.tolist(),
                         std=np.sqrt(np.maximum(squares / count - mean ** 2, 0)).tolist())
    remember(out)
    return out


def stats(data: str = "data", mix: str = "metaworld_corner4"):
    """Prints 1st and 99th percentile, mean and standard deviation of every action and state dimension."""
    for name in parse_mix(mix):
        for what, s in statistics(data, name).items():
            print(f"{name} {what}, {s['count']} steps")
            for i, row in enumerate(zip(s["q01"], s["q99"], s["mean"], s["std"])):
                print(f"  [{i:2d}] q01 {row[0]:10.4g}  q99 {row[1]:10.4g}  mean {row[2]:10.4g}  std {row[3]:10.4g}")


def video_clips(path: Path, fps: float, size: int, max_frames: int):
    """A video as clips of at most max_frames JPEG frames: (first frame's number, [bytes], whether the last clip). Frames
    are those on screen at n/fps seconds; the centre square is resized to `size`. Raises av.FFmpegError, ValueError."""
    import av
    import cv2

    def encode(frame):
        x = frame.to_ndarray(format="bgr24")
        h, w = x.shape[:2]
        side = min(h, w)
        x = x[(h - side) // 2:(h + side) // 2, (w - side) // 2:(w + side) // 2]
        x = cv2.resize(x, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
        return cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames, number, shown, start = [], 0, None, None
        for frame in chain(container.decode(stream), [None]):   # None: the end, when the last frame is still shown
            if frame is not None and frame.time is None:
                raise ValueError("its frames have no times")
            if shown is not None:
                until = frame.time - start if frame is not None else shown.time - start + 1e-6
                encoded = encode(shown) if number / fps < until - 1e-9 else None
                while number / fps < until - 1e-9:
                    frames.append(encoded)
                    number += 1
            elif frame is not None:
                start = frame.time
            shown = frame
            if len(frames) >= 2 * max_frames:                   # the rest is halved, so that no clip ends up tiny
                yield number - len(frames), frames[:max_frames], False
                frames = frames[max_frames:]
    half = -(-len(frames) // 2) if len(frames) > max_frames else 0
    if half:
        yield number - len(frames), frames[:half], False
    yield number - len(frames) + half, frames[half:], True


def from_videos(videos: str, name: str, data: str = "data", captions: str = "", fps: float = 10.0, size: int = 256,
                max_frames: int = 600):
    """Makes an RLDS dataset of a folder of MP4 or WebM files: frames at --fps, the centre square resized to --size.

    --captions: CSV without header, lines FILE,CAPTION (FILE relative to --videos, its ending may be left out); without
    it there are no instructions. Videos longer than --max-frames become several episodes. Files go in in a random order,
    so that the val split is a fair sample. An interrupted run goes on where it was.
    """
    import csv
    import av
    from tqdm import tqdm
    endings = (".mp4", ".webm", ".mkv", ".mov", ".avi")
    files = {str(p.relative_to(videos)): p for p in sorted(Path(videos).rglob("*")) if p.suffix.lower() in endings}
    if not files:
        fail(f"no video files ({', '.join(endings)}) in --videos '{videos}'")
    if name in REGISTRY or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        fail(f"--name '{name}' must be a new one, of lower-case letters, digits and '_'")
    if not 0 < fps <= 240 or size < 16 or max_frames < 2:
        fail(f"--fps {fps} must be in (0, 240], --size {size} at least 16, --max-frames {max_frames} at least 2")
    words = {}
    if captions:
        if not Path(captions).is_file():
            fail(f"no captions at '{captions}'")
        with open(captions, newline="", encoding="utf-8") as f:
            words = {row[0]: row[1].strip() for row in csv.reader(f) if len(row) > 1}
        words = {key: words.get(key) or words.get(str(Path(key).with_suffix("")), "") for key in files}
        if not all(words.values()):
            missing = [key for key in files if not words[key]]
            fail(f"{len(missing)} of {len(files)} videos have no caption in '{captions}', the first is '{missing[0]}'")
    f = tfds.features
    entry = Entry("1.0.0", f"{size}x{size} jpeg", "observation/image", "language_instruction" if captions else "", "", "",
                  hz=fps, offset=max(1, round(fps / 2)))
    features = {"steps": f.Dataset({"observation": {"image": f.Image(shape=(size, size, 3), encoding_format="jpeg")},
                                    "language_instruction": f.Text(), "is_first": np.bool_, "is_last": np.bool_}),
                "episode_metadata": {"file_path": f.Text(), "start": np.int64, "is_last_clip": np.bool_}}
    broken, told = [], zlib.crc32(repr(sorted(words.items())).encode())
    chosen = dict(fps=fps, size=size, max_frames=max_frames, captions=told)
    with DatasetWriter(data, name, entry, features, resume=True) as writer:
        options = writer.partial / "options.json"
        if options.exists() and json.loads(options.read_text()) != chosen:
            fail(f"'{writer.partial}' was begun with other options ({options.read_text()}); use those, or remove it")
        options.write_text(json.dumps(chosen))
        clips, whole = written_clips(writer.partial)
        if clips:
            print(f"continuing '{writer.partial}': {len(clips)} episodes of {len(whole)} whole videos are there")
        order = [key for key in np.random.default_rng(0).permutation(list(files)).tolist() if key not in whole]
        for key in tqdm(order, desc=name, unit="video", disable=None):
            try:
                for start, frames, last in video_clips(files[key], fps, size, max_frames):
                    if len(frames) <= entry.offset:
                        raise ValueError(f"it has {len(frames)} frames at {fps:g} fps, a frame pair spans {entry.offset + 1}")
                    if (key, start) in clips:
                        continue
                    writer.write({"steps": [{"observation": {"image": io.BytesIO(x)}, "language_instruction": words.get(key, ""),
                                             "is_first": i == 0, "is_last": i == len(frames) - 1}
                                            for i, x in enumerate(frames)],
                                  "episode_metadata": {"file_path": key, "start": start, "is_last_clip": last}})
                    clips.add((key, start))
            except (av.FFmpegError, ValueError) as error:
                broken.append(key)
                print(f"data_oxe: left out '{files[key]}', or the rest of it: {error}", file=sys.stderr)
        if not clips:
            fail(f"none of the {len(files)} videos in '{videos}' could be read")
    print(f"{writer.final}: {len(clips)} episodes of {len(files)} videos, {len(broken)} of them broken; "
          f"use it as --data {data} --mix {name}")


def written_clips(folder: Path) -> tuple[set, set]:
    """What an interrupted from-videos left in finished shards: {(file, start)} and {files that are whole}."""
    if not (folder / "dataset_info.json").exists():
        return set(), set()
    split = tfds.builder_from_directory(str(folder)).info.splits["train"]
    keys = [f"episode_metadata/{x}" for x in ("file_path", "start", "is_last_clip")]
    spec = {k: tf.io.FixedLenFeature([], tf.string if "path" in k else tf.int64) for k in keys}
    rows = [tf.io.parse_single_example(record, spec) for record in tf.data.TFRecordDataset(
        [s.filename for s in split.file_instructions])] if split.num_examples else []
    rows = [(x[keys[0]].numpy().decode(), int(x[keys[1]]), bool(x[keys[2]])) for x in rows]
    return {(key, start) for key, start, _ in rows}, {key for key, _, last in rows if last}


def write_fake(data: str, name: str, entry: Entry, episodes: int, length: int, frames: list[bytes], seed: int = 0):
    """A small dataset in another one's schema, for bench and tests: keys, widths, types and encodings as the registry
    declares them, random numbers, pictures from `frames` (encoded, all of one size; raw pixels if the entry says raw)."""
    f, rng = tfds.features, np.random.default_rng(seed)
    picture = tf.io.decode_image(frames[0], channels=3).numpy()
    kind = entry.frame.split()[1]
    step, fill = {}, []                                         # features, and (key, function of t) to fill them

    def add(key, feature, make):
        outer, _, inner = key.partition("/")                    # two levels at most: deeper '/' belong to the name
        if inner:
            step.setdefault(outer, {})[inner] = feature
        else:
            step[outer] = feature
        fill.append((outer, inner, make))

    if kind == "raw":
        add(entry.image, f.Tensor(shape=picture.shape, dtype=np.uint8),
            lambda t: tf.io.decode_image(frames[t % len(frames)], channels=3).numpy())
    else:
        add(entry.image, f.Image(shape=picture.shape, encoding_format=None if kind == "?" else kind),
            lambda t: io.BytesIO(frames[t % len(frames)]))
    for part in entry.instruction.split():
        key, _, storage = part.partition(":")
        words = f"instruction of {name}"
        if storage:                                             # language_table: zero-padded code points
            width = int(re.search(r"\[(\d+)]", storage)[1])
            tokens = np.pad([ord(c) for c in words], (0, width - len(words))).astype(np.int32)
            add(key, f.Tensor(shape=(width,), dtype=np.int32), lambda t, tokens=tokens: tokens)
        else:
            add(key, f.Text(), lambda t: words)
    for spec in dict.fromkeys((entry.action, entry.executed, entry.state)):
        for part, (key, kinds) in zip(spec.split(), columns_of(spec)):
            storage = (part.split(":") + ["float32"])[2]
            shape = () if storage.endswith("()") else (len(kinds),)
            dtype = {"zlib": np.float32, "bool": np.bool_}.get(storage.rstrip("()")) or np.dtype(storage.rstrip("()")).type
            add(key, f.Tensor(shape=shape, dtype=dtype, encoding="zlib" if storage == "zlib" else "none"),
                lambda t, shape=shape, dtype=dtype: rng.integers(0, 2, shape).astype(dtype) if dtype in (np.bool_, np.int64)
                else rng.standard_normal(shape).astype(dtype))
    for flag in ("is_first", "is_last", "is_terminal"):
        add(flag, np.bool_, lambda t, flag=flag: t == (0 if flag == "is_first" else length - 1))
    with DatasetWriter(data, name, entry, {"steps": f.Dataset(step), "episode_metadata": {"file_path": f.Text()}}) as w:
        for e in range(episodes):
            steps = []
            for t in range(length):
                one = {}
                for outer, inner, make in fill:
                    if inner:
                        one.setdefault(outer, {})[inner] = make(t)
                    else:
                        one[outer] = make(t)
                steps.append(one)
            w.write({"steps": steps, "episode_metadata": {"file_path": f"scene_{e % 3}/episode_{e}"}})


# ---------------------------------------------------------------------------------------------- bench
def status(key: str) -> float:
    """VmRSS, VmHWM (MB) or Threads of this process."""
    value = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return int(value) / (1 if key == "Threads" else 1024)


def rate(batches, pairs: int, batch_size: int, warm: int = 100) -> dict:
    """Draws `pairs` pairs; per second and per CPU second of this process, first batch's delay, bytes read, memory."""
    began = time.time()
    first = None
    for _ in range(warm):
        next(batches)
        first = first or time.time() - began
    read = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    wall, cpu, n = time.time(), time.process_time(), pairs // batch_size
    for _ in range(n):
        next(batches)
    wall, cpu, n = time.time() - wall, time.process_time() - cpu, n * batch_size
    read = int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1]) - read
    return dict(wall=n / wall, cpu=n / cpu, first_s=first, kb=read / n / 1e3, rss_mb=status("VmHWM"), threads=status("Threads"))


def measure(kind: str, data: str, mix: str, pairs: int, batch_size: int, size: int) -> dict:
    """One row of the table, in a process of its own so that memory and threads are the row's alone."""
    def loader(resize, split="train", **options):
        return Loader(data, mix, split, batch_size, size, resize=resize, **options)
    if kind in ("gpu", "cpu", "gpu, 16 pairs"):
        began = time.time()
        stream = iter(loader(kind[:3], pairs_per_episode=16 if "16" in kind else 8))
        opened = time.time() - began
        out = rate(stream, pairs, batch_size)
        return out | {"first_s": out["first_s"] + opened}
    if kind in ("raw", "raw, resized"):                         # encoded pairs that lie in memory (not in caches)
        one = loader("gpu" if kind == "raw" else "cpu")
        ds = one._encoded((0, 0)).take(64 * batch_size).cache().repeat().map(plainly(one._decode), num_parallel_calls=one.threads)
        ds = ds.map(plainly(lambda *x: x[-1])).batch(batch_size, drop_remainder=True)
        return rate(iter(one._options(ds)), pairs, batch_size)
    if kind == "naive":
        return rate(naive(data, mix, batch_size), pairs, batch_size, warm=1)
    if kind == "memory":                                        # a second pipeline, 20 validations, 10,000 batches
        train, val = loader("cpu"), loader("cpu", "val", shuffle_mb=8)
        stream, marks = iter(train), []

        def mark(batches):
            for _ in batches:
                pass
            marks.append(status("VmRSS"))
        mark(islice(stream, 100))
        for _ in range(21):
            mark(val.first(4))
        for _ in range(10):
            mark(islice(stream, pairs // batch_size // 10))
        return dict(marks=marks, rss_mb=status("VmHWM"), threads=status("Threads"))


def naive(data: str, mix: str, batch_size: int, N: int = 8):
    """What one writes first: a TFDS dataset each, Python picks the pairs and shuffles them decoded."""
    rng, buffer = np.random.default_rng(0), []
    entries = {name: find_entry(data, name) for name in parse_mix(mix)}
    streams = {name: iter(open_builder(data, name, e).as_dataset(split="train", shuffle_files=True).repeat())
               for name, e in entries.items()}
    while True:
        while len(buffer) < 8 * batch_size:
            name = rng.choice(list(streams))
            entry, keys = entries[name], entries[name].image.split("/")
            frames = []
            for step in next(streams[name])["steps"]:
                for key in keys:
                    step = step[key]
                frames.append(step.numpy())
            for t in rng.integers(0, len(frames) - entry.offset, N):
                buffer.append(np.stack([frames[t], frames[t + entry.offset]]))
        rng.shuffle(buffer)
        yield np.stack([buffer.pop() for _ in range(batch_size)])


def bench(data: str = "runs/bench", mix: str = "oxe29", fake: str = "", pairs: int = 16000, batch_size: int = 32,
          size: int = 224, repeats: int = 3, memory_batches: int = 0, out: str = "runs/bench"):
    """Loader against the raw limit (the same pictures, in memory, only decoded) and a naive loader, on this machine.

    --fake oxe29 first writes that mix's datasets into --data: their schemas, random numbers, 256x256 JPEG pictures, 48
    episodes of 40 steps each. Rows are processes of their own, taken in turns; medians of --repeats. The loader runs
    two threads. --memory-batches 10000 adds the long run: resident memory over batches and reopened validations.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    if fake:
        mix, frames = fake, fake_frames()
        for name in parse_mix(fake):
            if not (Path(data) / name).exists():
                entry = find_entry(data, name)
                write_fake(data, name, replace(entry, frame="256x256 jpeg"), 48, 40, frames)
                print(f"wrote {data}/{name}", flush=True)
    one = next(iter(parse_mix(mix)))
    many = len(parse_mix(mix))
    rows = [("raw limit: two JPEG decodes a pair", "raw", one), ("loader, 1 dataset, resize=gpu", "gpu", one),
            (f"loader, {many} datasets, resize=gpu", "gpu", mix),
            ("the same, 16 pairs an episode instead of 8", "gpu, 16 pairs", mix),
            (f"raw limit, resized to {size}", "raw, resized", one),
            (f"loader, 1 dataset, resized to {size}", "cpu", one), (f"loader, {many} datasets, resized to {size}", "cpu", mix),
            (f"naive generator, {many} datasets", "naive", mix)]

    def run(kind, over, n):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, kind, data, over, n, batch_size, size).result()
    results = {label: [] for label, _, _ in rows}
    for _ in range(repeats):
        for label, kind, over in rows:
            results[label].append(run(kind, over, pairs if kind != "naive" else 4 * batch_size))
    table = {label: {k: float(np.median([r[k] for r in x])) for k in x[0]} for label, x in results.items()}
    print("| | pairs/s | pairs per CPU s | of raw | peak RSS MB | threads | first batch s | KB read a pair |")
    print("|---|---|---|---|---|---|---|---|")
    for label, r in table.items():
        ratio = np.median([a["cpu"] / b["cpu"] for a, b in zip(results[label], results[rows[0][0]])])
        print(f"| {label} | {r['wall']:.0f} | {r['cpu']:.0f} | {ratio:.2f} | {r['rss_mb']:.0f} | {r['threads']:.0f} | "
              f"{r['first_s']:.1f} | {r['kb']:.0f} |")
    if memory_batches:
        m = run("memory", mix, memory_batches * batch_size)
        print(f"resident MB: training {m['marks'][0]:.0f}, with a validation pipeline {m['marks'][1]:.0f}, after 20 more of its "
              f"openings {m['marks'][21]:.0f}, over {memory_batches} batches {' '.join(f'{x:.0f}' for x in m['marks'][22:])}, "
              f"peak {m['rss_mb']:.0f}, {m['threads']:.0f} threads")
        table["memory"] = m
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "bench.json").write_text(json.dumps(table, indent=1))


def fake_frames(n: int = 64, size: int = 256, encoding: str = "jpeg") -> list[bytes]:
    """Encoded pictures of a moving smooth texture with a little noise; as JPEG some 25 KB, like a robot's camera."""
    import cv2
    rng = np.random.default_rng(0)
    wide = cv2.resize(rng.integers(0, 255, (24, 24, 3), np.uint8), (2 * size, 2 * size), interpolation=cv2.INTER_CUBIC)
    out = []
    for t in range(n):
        x = wide[t:t + size, 2 * t % size:2 * t % size + size] + rng.normal(0, 3, (size, size, 3))
        x = np.clip(x, 0, 255).astype(np.uint8)
        out.append((tf.io.encode_jpeg(x, quality=95) if encoding == "jpeg" else tf.io.encode_png(x)).numpy())
    return out


if __name__ == "__main__":
    import tyro
    tyro.extras.subcommand_cli_from_dict({"list": list_datasets, "inspect": inspect, "stats": stats, "bench": bench,
                                          "from-videos": from_videos}, description=__doc__)
