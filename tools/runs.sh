#!/bin/sh
# The runs behind the figures of docs/results.md, as plain commands: sh tools/runs.sh PART...
#
#   seeds      gated attention coding and direct coding at T=4, both in 8 bits, and the ANN of the same shape, three seeds
#              each, and the gain over direct coding and over the ANN by a paired bootstrap
#   distilled  the ANN by the recipe of `seeds`, and gated attention coding with it as teacher, the same seed
#   steps      both codings at T = 1, 2 and 6, in 8 bits, with energy
#   published  both by the published recipe (250 epochs, batch 64, mean loss), in bfloat16 and a CUDA graph
#   gates      the gate with less attention, at a tenth of the rate and with weight decay: 40 epochs in 8 bits, judged
#              on a validation split of the training set
#   moving     the gate at a tenth of the rate and with weight decay, which kept it moving there, for whole runs in 8
#              bits, the seeds of `seeds`, and the gain over direct coding and over the full gate
#   digits     the same gates, direct coding and the full gate in 8 bits on scikit-learn's digits, ten seeds each: for a
#              CPU, without DATA, about an hour
#   eight_bits gated attention coding with three seeds in 8 bits, the int8 network of each, and the same in bfloat16
#   neurons    learned decay and threshold, at the rate of the weights and at a tenth of it
#   formats    agreement between number formats, for the first seed in 8 bits and in bfloat16; and of 40 epochs with and
#              without noise on the currents: a little more than a layer's own rounding, and ten times that
#
# DATA is the .npz (cifar100.npz), OUT the folder of the runs (runs), RESULTS the table that gets a row a run. What is
# finished is left alone and what was begun goes on, so the same command may be given again. `eval` reads the stored
# float16 weights: in float32, the figure to cite, and in bfloat16.
set -eu
DATA=${DATA:-cifar100.npz}
OUT=${OUT:-runs}
RESULTS=${RESULTS:-results/training.csv}

case $OUT in
  *[[:space:]]*)
    echo "expected OUT without blanks, got '$OUT': choose another folder" >&2
    exit 2
    ;;
esac
[ $# -gt 0 ] || set -- none
for part in "$@"; do
  case $part in
    seeds | distilled | steps | published | gates | moving | digits | eight_bits | neurons | formats) ;;
    *)
      echo "expected parts among seeds, distilled, steps, published, gates, moving, digits, eight_bits, neurons, formats, got '$part'" >&2
      exit 2
      ;;
  esac
done
mkdir -p "$OUT"

# A folder of a finished run is taken for this one only if it was begun with the same words.
train() { # NAME RECIPE [OPTION...]
  name=$1
  shift
  if [ -d "$OUT/$name" ] && [ "$(cat "$OUT/$name.words" 2>/dev/null)" != "$*" ]; then
    echo "expected a run of '$*' in $OUT/$name, got one of other options: move it away" >&2
    exit 2
  fi
  echo "$*" > "$OUT/$name.words"
  [ -f "$OUT/$name/result.csv" ] && return
  resume=
  [ -d "$OUT/$name/checkpoints" ] && resume=--resume
  timm-gac train "$@" --data "$DATA" --out "$OUT/$name" --results "$RESULTS" $resume
}

evaluate() { # NAME
  for precision in float32 bfloat16; do
    [ -f "$OUT/$1/$precision.npz" ] || timm-gac eval "$OUT/$1" --data "$DATA" --precision "$precision" \
      --answers "$OUT/$1/$precision.npz" --json "$OUT/$1/$precision.json" --overwrite
  done
}

pair() { # SUFFIX RECIPE [OPTION...]: both codings
  suffix=$1
  shift
  train "gac_$suffix" "$@"
  train "direct_$suffix" "$@" --model msresnet18_cifar
  evaluate "gac_$suffix"
  evaluate "direct_$suffix"
}

ann() { # SEED: the ANN of the same shape, by the same recipe
  train "ann_seed$1" cifar100_fast --seed "$1" --model ann_resnet18_cifar
  evaluate "ann_seed$1"
}

answers() { # CODING SUFFIX...: the files of the runs
  coding=$1
  shift
  for suffix in "$@"; do printf '%s/%s_%s/float32.npz ' "$OUT" "$coding" "$suffix"; done
}

for part in "$@"; do
  case $part in
    seeds)
      for seed in 0 1 2; do
        pair "seed$seed" cifar100_fast --int8-convs --seed "$seed"
        ann "$seed"
      done
      for other in direct ann; do
        # shellcheck disable=SC2046  # one word a file
        timm-gac gain $(answers gac seed0 seed1 seed2) --against $(answers "$other" seed0 seed1 seed2)
      done
      ;;
    distilled)
      ann 0
      train gac_distilled cifar100_fast --int8-convs --seed 0 --teacher "$OUT/ann_seed0"
      evaluate gac_distilled
      ;;
    steps)
      for steps in 1 2 6; do
        pair "t$steps" cifar100_fast --int8-convs --num-steps "$steps"
        for coding in gac direct; do
          timm-gac energy "$OUT/${coding}_t$steps" --data "$DATA" --out "$OUT/${coding}_t$steps" --overwrite
        done
      done
      ;;
    published)
      pair published cifar100 --precision bfloat16 --cuda-graph
      # shellcheck disable=SC2046
      timm-gac gain $(answers gac published) --against $(answers direct published)
      ;;
    gates)
      # Evaluated each epoch, for gate.csv to have what the gate did in it.
      short="cifar100_fast --epochs 40 --holdout 0.1 --int8-convs --eval-every 1"
      # shellcheck disable=SC2086  # words
      for gate in full spatial temporal half open; do
        train "gate_$gate" $short --gate "$gate"
      done
      # shellcheck disable=SC2086
      {
        train gate_slow $short --gate-lr 0.1
        train gate_decay $short --gate-decay 1
        train gate_direct $short --model msresnet18_cifar
      }
      ;;
    moving)
      for seed in 0 1 2; do
        train "gac_slow_seed$seed" cifar100_fast --int8-convs --gate-lr 0.1 --seed "$seed"
        train "gac_decay_seed$seed" cifar100_fast --int8-convs --gate-decay 1 --seed "$seed"
        evaluate "gac_slow_seed$seed"
        evaluate "gac_decay_seed$seed"
        pair "seed$seed" cifar100_fast --int8-convs --seed "$seed"
      done
      for gate in slow decay; do
        for other in direct gac; do
          # shellcheck disable=SC2046
          timm-gac gain $(answers "gac_$gate" seed0 seed1 seed2) --against $(answers "$other" seed0 seed1 seed2)
        done
      done
      ;;
    digits)
      ( # with settings of its own
        DATA=digits
        RESULTS=${DIGITS_RESULTS:-results/digits.csv}
        for seed in 0 1 2 3 4 5 6 7 8 9; do
          for gate in full spatial temporal half open; do
            train "digits_${gate}_seed$seed" digits --seed "$seed" --gate "$gate"
          done
          train "digits_slow_seed$seed" digits --seed "$seed" --gate-lr 0.1
          train "digits_decay_seed$seed" digits --seed "$seed" --gate-decay 1
          train "digits_direct_seed$seed" digits --seed "$seed" --model test_msresnet
          train "digits_int8_seed$seed" digits --seed "$seed" --int8-convs
          for coding in full spatial temporal half open slow decay direct int8; do
            run=$OUT/digits_${coding}_seed$seed
            [ -f "$run/float32.npz" ] || timm-gac eval "$run" --data digits --answers "$run/float32.npz" --overwrite
          done
        done
        for coding in full spatial temporal half open slow decay; do
          echo "$coding against direct:"
          timm-gac gain "$OUT"/digits_"$coding"_seed?/float32.npz --against "$OUT"/digits_direct_seed?/float32.npz
        done
        echo "8 bits against float32:"
        timm-gac gain "$OUT"/digits_int8_seed?/float32.npz --against "$OUT"/digits_full_seed?/float32.npz
      )
      ;;
    eight_bits)
      for seed in 0 1 2; do
        train "gac_seed$seed" cifar100_fast --int8-convs --seed "$seed"
        evaluate "gac_seed$seed"
        [ -d "$OUT/gac_seed$seed/quantized" ] ||
          timm-gac quantize "$OUT/gac_seed$seed" "$OUT/gac_seed$seed/quantized"
        timm-gac eval "$OUT/gac_seed$seed/quantized" --data "$DATA" --answers "$OUT/gac_seed$seed/int8.npz" \
          --json "$OUT/gac_seed$seed/int8.json" --overwrite
        train "gac_bfloat16_seed$seed" cifar100_fast --seed "$seed"
        evaluate "gac_bfloat16_seed$seed"
      done
      # shellcheck disable=SC2046
      timm-gac gain $(answers gac seed0 seed1 seed2) --against $(answers gac bfloat16_seed0 bfloat16_seed1 bfloat16_seed2)
      ;;
    neurons)
      train plif cifar100_fast --neuron plif
      train plif_slow cifar100_fast --neuron plif --neuron-lr 0.1
      evaluate plif
      evaluate plif_slow
      ;;
    formats)
      train gac_seed0 cifar100_fast --int8-convs --seed 0
      train gac_bfloat16_seed0 cifar100_fast --seed 0
      for run in gac_seed0 gac_bfloat16_seed0; do
        timm-gac compare "$OUT/$run" --data "$DATA" --images 10000 --json "$OUT/$run/formats.json" --overwrite \
          --formats float32 channels_last folded bfloat16 float16 int8 float64
      done
      for noise in 0.0 0.01 0.1; do
        train "noise_$noise" cifar100_fast --epochs 40 --current-noise "$noise"
        timm-gac compare "$OUT/noise_$noise" --data "$DATA" --images 10000 --json "$OUT/noise_$noise/formats.json" \
          --overwrite --formats float32 bfloat16 float16 int8
      done
      ;;
  esac
done
