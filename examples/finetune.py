"""Fine-tune a spiking network on pictures (FOLDER/train/CLASS/*, FOLDER/val/CLASS/*) with timm and accelerate.

python examples/finetune.py FOLDER --model gac_msresnet34 --epochs 3
accelerate launch --config_file examples/launch/several_gpus.yaml examples/finetune.py FOLDER
"""

import argparse
from pathlib import Path

import accelerate
import timm.optim
import torch

import timm_gac  # noqa: F401 (registers the models)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="pictures: train/CLASS/* and val/CLASS/*")
parser.add_argument("--model", default="gac_msresnet34", help="a name, local-dir:FOLDER or hf-hub:OWNER/NAME")
parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="default: where the model has weights")
parser.add_argument("--num-steps", type=int, help="time steps T; the network's own where left out; none of an ANN")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=32, help="images per step and process")
parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
parser.add_argument("--freeze", action="store_true", help="train the classifier alone: a linear probe of the features")
parser.add_argument("--seed", type=int, default=0, help="of the new weights, the order of the pictures and their crops")
parser.add_argument("--out", default="finetuned", help="new folder for config.json and model.safetensors")
args = parser.parse_args()
if Path(args.out).exists():
    parser.exit(2, f"expected a new folder as --out, got {args.out}, which is there: choose another\n")
accelerator = accelerate.Accelerator()
accelerate.utils.set_seed(args.seed)
try:
    sets = {split: timm.data.create_dataset("", args.folder, split=split) for split in ("train", "val")}
    classes, found = (dataset.reader.class_to_idx for dataset in sets.values())
    if args.folder in [dataset.reader.root for dataset in sets.values()]:  # where timm finds no split, it takes all
        raise ValueError(f"expected the folders train and val in {args.folder}, got one or none of them: make both")
    if foreign := [name for name in found if name not in classes]:
        raise ValueError(f"expected val classes that train has, got {', '.join(foreign)} too: rename or remove these")
    if len(classes) < 2:
        raise ValueError(f"expected train pictures of two classes or more, got only {', '.join(classes)}: add another")
    if unseen := [name for name in classes if name not in found]:
        accelerator.print(f"warning: val has no picture of {', '.join(unseen)}, so top-1 says nothing of these")
    sets["val"] = timm.data.create_dataset("", args.folder, split="val", class_map=classes)  # the same classes by name
    has_weights = ":" in args.model or getattr(timm.get_pretrained_cfg(args.model), "has_weights", False)
    stored = has_weights if args.pretrained is None else args.pretrained
    accelerator.print(f"{args.model} from {'stored' if stored else 'random'} weights, classes {', '.join(classes)}")
    model = timm.create_model(args.model, stored, num_classes=len(classes), num_steps=args.num_steps)
except (AssertionError, OSError, RuntimeError, ValueError) as error:  # timm asserts without a word that FOLDER exists
    parser.exit(2, f"{str(error) or f'expected a folder of pictures, got {args.folder}: check the path'}\n")
if args.freeze:
    model.requires_grad_(False).get_classifier().requires_grad_(True)
config = timm.data.resolve_data_config(model=model)
for split, dataset in sets.items():
    dataset.transform = timm.data.create_transform(**config, is_training=split == "train")
train = torch.utils.data.DataLoader(sets["train"], args.batch_size, shuffle=True, num_workers=2)
val = torch.utils.data.DataLoader(sets["val"], args.batch_size, num_workers=2)
optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(train))
model, optimizer, train, val, schedule = accelerator.prepare(model, optimizer, train, val, schedule)

for epoch in range(args.epochs):
    model.train(not args.freeze)  # frozen batch norms keep their statistics
    for images, labels in train:
        accelerator.backward(torch.nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        hits = [accelerator.gather_for_metrics(model(images).argmax(1) == labels) for images, labels in val]
    accelerator.print(f"epoch {epoch + 1}: top-1 {torch.cat(hits).float().mean():.2%} of {len(sets['val'])}")

state = accelerator.get_state_dict(model)  # whole, also where FSDP2 divides the weights: every process takes part
if accelerator.is_main_process:
    trained = timm.create_model(args.model, num_classes=len(classes), num_steps=args.num_steps)
    trained.load_state_dict(state)
    trained.pretrained_cfg = accelerator.unwrap_model(model).pretrained_cfg  # size, crop, licence of stored weights
    about = dict(model_config={"label_names": list(classes)}, model_args=getattr(trained, "changed_args", dict)())
    timm.models.save_for_hf(trained, args.out, **about, safe_serialization=True)
    accelerator.print(f"saved in {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True) loads it")
