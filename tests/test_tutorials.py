"""Every tutorial runs by itself from any directory, quickly and silently on stderr, and prints what
it is about. A tutorial asserts its own claims; here is the view from outside.

A new tutorial is tested as soon as it is in the folder. What it must print can be added to PRINTS.
"""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import minitx
from minitx.fast import ONE_THREAD
from minitx.lab.evaluate import evaluate
from minitx.learn.exercise import find_exercise

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tutorials"
ANSWERS = FOLDER / "answers"
NUMBERED = sorted(path.name for path in FOLDER.glob("[0-9]*.py"))
SOURCES = {name: (FOLDER / name).read_text("utf-8") for name in NUMBERED}
NAMES = [name for name in NUMBERED if "from helpers import" in SOURCES[name]]
COLUMNS = 100
# CPU time of a tutorial, which other programs hardly change, on a slow machine: about three times
# what the longest takes. HUNG: wall time after which it is ended, however loaded the machine is.
CPU_SECONDS, HUNG = 40, 1200

# By the number of a tutorial: the beginnings of lines (regular expressions) that it prints, in this
# order. A few that show that each section says something sensible are enough.
PRINTS = {
    "01": [
        r"141 characters are \d+ tokens: ",
        r"' kite' is one token, ' Zürich' is 5 tokens: ",
        r"  most similar to Tom: ",
        r"attention weights \[0\.58 0\.14 0\.28\]$",
        r"a query at position 107, a key at 105: [+-]\d+\.\d{4}$",
        r"our first block against the model's: error \de-0[67] ",
        r"after block 8: ' park' +\d+% ",
        r"float32: flat_forward against the model, error \de-0[67] ",
        r"float64: flat_forward against the model, error \de-1[4-6] ",
        r"Transformer$",
        r"  attn\.rope +Rope\(",
        r"Block \d+, head \d+: the last token puts \d+% of its attention on park ",
        r"     the \|[ .,:=+*#%@-]+$",
        r"24 new tokens, and lm\.generate gives the same\.$",
        r"temperature 0 +possible tokens: +1 +the most likely: 100%$",
        r"temperature 1, top_k 5 +possible tokens: +5 ",
    ],
    "02": [
        r"  token 3: keys of head 1: \[2\. 0\. 2\.\], result \[9\.37 6\.6 \]$",
        r"  token 3: computed key 2\.0, result \[9\.37 6\.6 \]$",
        r"48 new tokens after a prompt of 30, the same both ways\. ",
        r"  S +projections +attention +feed-forward +head +counted in all$",
        r"  512 +393,216 +1,048,576 +1,081,344 +130,816 +2,653,952$",
        r"  S = 512 without +1024\.1 #+$",
        r"weights 6\.42 MB, KV cache at S = 512 2\.10 MB \(4,096 bytes a token\)$",
        r"times a matrix of 101 MB: 64 rows are 64 times the work of one and take \d+ ",
        r"  4 tokens of one text +4 +6\.4 MB +\d\.\d\d +0\.\d\d$",
        r"All products of a token are \d+% of the time of its pass\.$",
        r"  8 billion weights +16,060\.0 +1,073\.7 +34,359\.7$",
        r"  attention +8% +40%  6, 7: ",
    ],
    "03": [
        r"online:   x / rms = \[ 1\. -1\.\]   times folded W = \[-18\.  -4\.\]$",
        r"\+     norm: WeightlessRMSNorm\(eps=1e-05\)$",
        r"gone: 2,048 weights, two gains of 128 numbers in each of 8 blocks$",
        r"0\.1 \* \(0\.2 \* 0\.3\) = 0\.006$",
        r"  none +(yes|no) +\de-0[67] +\de-1[456]$",
        r"  one gain wrong by 1/10,000 +(yes|no) +\de-0[67] +4e-07$",
        r"side by side: \[-3\.  1\.  1\. -2\.\]$",
        r"products for one token: 57 before, 33 after$",
        r"  home  embedding \[7\. 1\.\]  ->  ready in the table: \[ 6\.8 10\.4\]$",
        r"  stack\.blocks\.0  194,048  161,280  #{40}\.{8}$",
        r"the table: 1,022 rows of 128 \+ 256 numbers, 1\.57 MB, made once by the work of 20 ",
        r"  entering block 1: +\d+% #+$",
        r"  a token and its position +327,040 +167$",
        r"merge_embeddings: 3\.9 MB of weights become 171\.1 MB, ",
        r"  all three +1,650,432 +32 +7\.86 +\d\.\d\d ",
        r"  stories-parallel  4 blocks  18\.8% #+$",
        r"two matrices:   query \[5\. 7\.\]  key \[12\.  2\.\]$",
        r"  remove_weights +178,304 multiply-adds in 13 products$",
    ],
    "04": [
        r"  1 +1  2 +1  2  -1 +2\.72  7\.39  0\.37 +0\.26  0\.71  0\.04 +kitchen +0\.45$",
        r"  layer 4 says park +probability of park +99\.\d% #+$",
        r"  4 +7\d% +100% +6\d% +[34]\d%$",
        r"  park +2 +\d +\d$",
        r"  random, threshold 0\.9 +0\.8\d +\+0\.02\d\d +8\d% ",
        r"  gap, threshold 0\.95 +0\.8\d +\+0\.08\d\d +3\d% ",
        r"2,\d\d\d of 4,\d\d\d tokens are sure after layer 2; 0 of them are wrong\.$",
        r"  backfilled: h after layer 1 +1  2 +1  2  -1 +kitchen$",
        r"  backfilled +probability of park +5\d\.\d% #+$",
        r"  gap, deferred +1\.\d\d +\+0\.00\d\d +100% ",
        r"  saturation +0\.6\d +\d+% +\+0\.00\d\d +\+0\.00\d\d$",
        r"multiply-adds: a layer 184,320 .*, a gap 130,816$",
        r"  exit probe +[01]\.\d\d #+$",
        r"  30 good stories in a row: p = 0\.9\^30 = 0\.042$",
        r"  p-value at most +0\.003 +0\.017 +0\.054 +0\.132$",
        r"  0\.9 +2\.\d% +0\.0[34]\d\d +passes$",
        r"  0\.8 +3\.\d% +0\.1\d\d\d +fails: stop$",
    ],
    "05": [
        r"  \[3 0\] +\[0 4\] +\[3 4\] +3 +5\.0 +9 +0\.600$",
        r"  1 +0\.17\d +0\.06\d +#+$",
        r"  1 +0\.17\d +\+9\.\d+$",
        r"  layer 5: FFN runs, cosine 0\.99, reaches 0\.9: skip the next 2$",
        r"  park +4 #+$",
        r"  random +40% +0\.77 +\+0\.03\d\d ",
        r"  static +40% +0\.77 +\+0\.00\d\d ",
        r"  3 +7\d% +2\d%$",
        r"  warm_up = 25 +34% +0\.80 ",
        r"multiply-adds: an FFN \(3 D F\) 135,168, a cosine \(3 D\) 384$",
        r"  layers 6 to 8 +[01]\.\d\d #+$",
    ],
    "06": [
        r"all six keys: 15\.515\. The two best, 93\.6% of the weight: 15\.379$",
        r"error -0\.136 = 0\.064 \* \(15\.379 - 17\.514\)$",
        r"  oracle +32 +0\.7\d\d +100% +100% +100%$",
        r"  random +8 +\d\.\d{3} +\d+% +\d+% +\d+%$",
        r"11 of 32 bits differ: an angle of about 180 \* 11 / 32 = 62 degrees \(true: 60\)$",
        r"  75 degrees, 2\.0 +45 +55 +1\.41 +1\.15 +kept$",
        r"  32 +\d+\.\d degrees +\d+\.\d degrees$",
        r"query at 20 degrees: .*, key 0 just matters: 0\.98 / 2 = 0\.49$",
        r"t = 0\.72$",
        r"  p = 2\.0 +\d+% +\d\.\d{3} +\d+% +\d+% +\d+%$",
        r"  dense +16,384 +1,048,576 +0 +2,097,152$",
        r"p = 4: \d\.\d\d times as fast as dense ",
    ],
    "07": [
        r"scores  \[ 5\. -3\.  4\. -4\.\]$",
        r"  smallest: -2 in column 1, added to key 3: \[ 6\. -4\.  3\. -2\.\]$",
        r"  key 1 +\[-3\.  0\.  2\.\] +0\.67 +-2\.22 +-3\.00$",
        r"  exact +-0\.7 +-16\.0 +0\.7 +0\.9 +7\.6 +-8\.4$",
        r"  token 4 +A +E D C +C +2$",
        r"  oracle +\d+% +0\.\d{3} +\d+% +\d+%$",
        r"  A3 +\d+% +\d\.\d{3} +\d+% +\d+%$",
        r"Dense attention, with all keys: loss 0\.7\d\d$",
        r"  dense +100% +552,960 +1\.00 +1\.00$",
        r"  DOTA +20% +[\d,]+ +0\.50 +\d\.\d\d$",
        r"  A3 +\d+% +[\d,]+ +0\.20 +0\.\d\d$",
        r"In NumPy, selecting costs more time than it saves",
    ],
    "08": [
        r"codes +\[ 7 -3  1  0\]$",
        r"  3 bits  \|             \|             \|             \|",
        r"    mean error of the first four 0\.0775, of the others 0\.0625$",
        r"    mean error of the first four 0\.0225, of the others 0\.0625$",
        r"asymmetric: scale 0\.10, zero point 1, codes \[ 0  4  9 15\]$",
        r"  8 bits +2,233,856 +0\.77\d\d +100% ",
        r"  4 bits +1,498,624 +0\.77\d\d +100% ",
        r"  3 bits +0\.81\d +0\.8[12]\d +0\.8[56]\d$",
        r"  2 bits   [34]\.\d{3} #{60}$",
        r"With 2 bits in groups of 32, 75% of the weights become 0\.$",
        r"  0\.7 .* 2\.10$",
        r"  cache in 8 bits +576,000 +0\.77\d\d ",
        r"100 \* 100 in int8 is 16$",
        r"  4 bits +0\.21 +4\.7 ",
        r"  4\.25 +4\.25 GB +4\.25 ms +3\.8$",
    ],
    "09": [
        r"  input 1    5\.0     0\.3   0\.2  -0\.7     0\.3   0\.2   0\.7     1\.5   1\.0   3\.5$",
        r"wanda     drops \[0\.9 0\.4 0\.2\], errors of the outputs \[0\.9 0\.4 0\.4\]$",
        r"  random weights +0\.9\d\d +3\.\d{3} +5\.\d{3}$",
        r"  magnitude +0\.78\d +0\.79\d +0\.8[56]\d$",
        r"2 of 4    \[0\.9 0\.8 0\.  0\.  0\.3 0\.2 0\.  0\. \] ",
        r"  packed zeros +1\.00 +0\.58 +0\.\d\d$",
        r"scores, their product +\[1\.  0\.5 2\. \]$",
        r"  neurons +0\.79\d +0\.9\d\d +2\.\d{3}$",
        r"singular values: \[9\.  0\.9 0\. \]$",
        r"\(x column\) row  \[10\. 10\.  5\.\]  3 \+ 3 multiply-adds$",
        r"  ffn\.down\.w +\(352, 128\) +80% +75%$",
        r"  low rank, weighted +0\.9\d\d +1\.\d{3} +2\.\d{3}$",
        r"  random weights +3\.\d{3} #{50}$",
        r"  neurons +0\.75 +0\.73 +\d\.\d\d +0\.9\d\d$",
        r"  half of the columns +0\.\d\d$",
    ],
    "10": [
        r"     \(-1, 1\)       0       1       2      -1       0       1      -2      -1       0$",
        r"\(1, -1, 0, 1\) \. \(1, 1, -1, 1\) = 0 \+ 1 = 1, with 2 reads and no multiplication$",
        r"45,056 multiply-adds became 22,528 reads from 65,536 entries$",
        r"lut_product: 1\.50 MB of arrays, loss 0\.8\d\d, says 'park'$",
        r"  4 bits   256 bytes       66 KB      17 MB        4 GB$",
        r"\(3, 5\) \. \(2, 3\) = 2 \* 8 \+ 1 \* 5 = 21$",
        r"lut_bit_serial: 2\.22 MB of arrays, loss 0\.8\d\d, says 'park'$",
        r"sum of the rows: \[5\. 3\.\]   the exact product: \[5\.9 3\.3\]$",
        r"lut_centroid, last 2 blocks: 11\.10 MB of arrays, loss 0\.8\d\d, ",
        r"lut_centroid, all 8 blocks: 24\.73 MB of arrays, loss [2-9]\.",
        r"  silu\( 1\.5\): bits 0011111000000000 = entry 15872, reads 1\.226362 ",
        r"  lut_product +237,056 +737,280 +66 ",
        r"  lut_bit_serial +228,096 +1,474,560 +6 ",
        r"  lut_product          #{6}r{18}$",
        r"  lut_product +0\.\d\d  slower$",
        r"one read takes the time of \d+ multiply-adds$",
        r"  GELU by table: \d\.\d\d ",
    ],
    "11": [
        r"  garden +1/10 +1/5 +1/2 +0$",
        r"comes out: +park 3/5, kitchen 3/10, garden 1/10, cave 0$",
        r"  0\.7 +1\.00 +1\.70 +2\.19 +2\.77 +3\.20$",
        r"  4 accepted \|",
        r"\d+ tokens in \d+ passes; the target model alone writes the same text\.$",
        r"  park +\d+% #+$",
        r"  greedy +\d\d% +[2-4]\.\d\d +1\.\d\d$",
        r"  temperature 1 +\d\d% +[3-5]\.\d\d +1\.\d\d$",
        r"\.\.\. .+ \.\.\.$",
        r"  word +q +p +drawn +standard error$",
        r"  guess 3: 0\.4  0\.32 #+$",
        r"  0\.9 to 1,  [56]\d% of all +(9\d|100)% #+$",
        r"  gamma = 8, stop = 0 +[3-7]\.\d\d +7\.\d\d +[1-4]\.\d\d +1\.\d\d$",
        r"  gamma = 8, stop = 0\.3 +[3-6]\.\d\d +[3-6]\.\d\d +[01]\.\d\d +1\.\d\d$",
        r"  block by block +\d\.\d\d ",
        r"  288 x 6 +61 MB +\d\.\d\d ",
        r"  gamma = 8, stop = 0\.3 +\d\.\d\d +\d\.\d\d +[23]\.\d\d$",
        r"measured, with it: \d\.\d\d$",
    ],
    "12": [
        r"  B +\[1 1\] +\[1 1\] +\[2 2\] +0\.000$",
        r"  B +\[-1  3\]   18 degrees$",
        r"  1 +0\.92\d +\+9\.\d+ +0% +0% +0%$",
        r"  3 +0\.1\d\d +\+0\.0[45]\d\d +\d\d% ",
        r"  2 +\+0\.0\d+ +\+0\.4\d+ +\+0\.01\d\d$",
        r"  4 +\+0\.01\d\d +29% +\+0\.01\d\d +29% +\+5\.\d+ +29%$",
        r"  1 and 2 +\+8\.\d+ +0% ",
        r"  5 and 6 +[+-]0\.000\d +100% ",
        r"  5 to 8 +0\.66x +\+0\.01\d\d ",
        r"  3 layers dropped +1,180,416 +0\.66x +\d\.\d\dx$",
    ],
    "13": [
        r"  2 +4 +3 +-1 +0\.5 +-2 +-1$",
        r"  A +0\.0 +2\.0 +\+2\.0$",
        r"  3 +\. \d\d% +- +is \d\d% +Tom \d+%$",
        r"  3 +went \d\d% +the \d\d% +Tom \d+% +Tom \d+%$",
        r"The ball is with Anna\. The model says: kitchen$",
        r"  3 +Anna \d\d% .* ball \d\d%$",
        r"  1 +[#%@*]{4} +[#%@*]{4} +\+0\.[45]\d{3} ",
        r"  3 +[#%*=+-]{4} +[#%*=+-]{4} +\+0\.0\d{3} +\d+% +\d+% +\d\d% +[3-7]\d%$",
        r"Rank correlation of the loss with the importance: 0\.[78]\d$",
        r"  12 removed, in rounds: 4 4 4 4 1 1 1 1 ",
        r"  12 +in rounds +0\.88 +\+0\.00\d\d +(9\d|100)% ",
        r"  18 +random +0\.82 +\+[12]\.\d{4} ",
        r"length 4: weights \[0\.96 0\.02 0\.02\]$",
        r"  the +[1-4]( [1-4]){7}$",
        r"  3 to 8 +longest queries +0\.93 +\+0\.0\d{3} +(9\d|100)% ",
        r"  value_prune +0\.95 +\+0\.00\d\d ",
        r"  12 heads removed +2,129,664 +5,897,728 +1,572,864$",
        r"  head_router +\d\.\d\d #+$",
    ],
    "14": [
        r"  A  received 11/6, per query 11/18 #+$",
        r"  B +17/12 +5/6 +17/10 +2/3$",
        r"SpAtten, plain sum: 19 of 38 tokens\. It answers: park$",
        r"\(start\) Once upon a time there was a boy named Tom ",
        r"SpAtten, corrected: 19 of 38 tokens\. It answers: park$",
        r"  there +###\.{5}  #{8}$",
        r"  boy +#{8}  #{8}$",
        r"  8 [#.x]{90}$",
        r"  8 [#r]{90}$",
        r"SpAtten: 5\d% of them never reached it\.$",
        r"  SpAtten, corrected +0\.79 +0\.94 +0\.81$",
        r"  LazyLLM +0\.80 +[12]\.\d\d +1\.00$",
        r"  1 +2\d\.\d\d +0\.89$",
        r"  LazyLLM +\d\.\d\d +\d\.\d\d$",
        r"  SpAtten, corrected +0\.71 +8\d% +\d\d% +\d\d%$",
        r"  LazyLLM +0\.71 +(9\d|100)% +\d\d% +\d\d%$",
    ],
    "15": [
        r"sum -5, after ReLU 0$",
        r"multiply-adds: dense 24; skipping, with a comparison for each h: 19$",
        r"  layer 2  8\d% #{40}$",
        r"All: 7\d%\. Rows that a token needs: 2\d%\.$",
        r"  W_down +262,144 +\d\d,\d{3} +0\.2\d$",
        r"  99% +\d\.\d\d +0\.\d\d$",
        r"  positive weights first +\[ 1 -4 -2 -1\] +\[ 2 -4 -6 -1\] +\[ 2 -2 -8 -9\]$",
        r"after the positive weight: -1; in the end: 2$",
        r"m = -1, shifted inputs \[5 0 3 3\], r = -1, start at 1$",
        r"  2 +1 +-9 +7\.07 +-1\.93$",
        r"  bound, centered +0\.8\d +0\.9\d +0\.0000\d\d$",
        r"  48 +0\.02 +0\.6\d +6\d\.\d% +2\.\d% +0\.\d%$",
        r"  negative_predict, 2% of misses +0\.9\d +[+-]0\.00\d\d +0\.000\d$",
        r"  negative_predict, 2% of misses, random +0\.9\d +\+[23]\.\d+ ",
        r"\|h\| > 0\.15:         neurons \[1 2\]$",
        r"exactly 0: 0\.0%$",
        r"  cats 0\.5 +0\.79 +[+-]0\.0\d+ +0\.00[12]\d$",
        r"  teal 0\.4, greedy +0\.66 +[+-]0\.0\d+ +0\.01\d\d$",
        r"  ffn\.down +0\.2\d #+$",
        r"predicted: neuron \[2\]$",
        r"  30% +0\.30 +0\.8\d +0\.9\d +0\.9\d$",
        r"  contextual_sparsity, score > 0 +0\.7\d +[+-]0\.00\d\d +0\.00\d\d$",
        r"  negative_predict and zero_skip +0\.[67]\d +0\.7\d +[+-]0\.00\d\d +0\.000\d +0\.\d\d$",
        r"negative_skip with inputs centered is exact; section 4: work 0\.9\d$",
    ],
    "16": [
        r"x' = \[1 2 5\]   y' = \[ 5 11\] \+ 2 \* \[0 3\] = \[ 5 17\]   with 2$",
        r"  4 +18 +10 +8 +18 +0$",
        r"  1 +1\.\d\d +1\.\d\d +0\.00 +0\.00$",
        r"  5 +1\.\d\d +1\.\d\d +0\.[56]\d +0\.[23]\d$",
        r"  the library\. Someone had sent +the field\. Someone had sent +0\.\d\d$",
        r"  out +0\.8\d #+$",
        r"  delta, ffn +0\.8[23]\d +[+-]0\.00\d\d +2\d +5\d%$",
        r"  zero, ffn +0\.7[67]\d +[+-]0\.00\d\d +2\d +4\d%$",
        r"  1 +6\d% +6\d% +\d%$",
        r"  5 +0% +[23]\d% +[34]\d%$",
        r"  equal vectors +0\.99\d +[+-]0\.0000 +23 +\d\d%$",
        r"  radius 0\.35 +0\.[78]\d\d +[+-]0\.00\d\d +2\d +4\d% +0\.2\d +1\d%$",
        r"  random entries +0\.6\d\d +\+[4-7]\.\d{4} ",
        r"\d+ of 3\d\d checked hits were false: \d+%\. Of all hits: 1\d%\.$",
        r"  both signs   \[ 3 -5  4 -1\] +1 +7 +14 +0\.5$",
        r"  norm, mean +0\.92\d +\+0\.[01]\d{3} ",
        r"  stride, rate +0\.92\d +\+0\.[4-6]\d{3} ",
        r"  every 2nd token +0\.8[56]\d +\+0\.00\d\d +2\d$",
        r"  \.\.\. copied +0\.8[56]\d +\+0\.[01]\d{3} +2\d$",
        r"  5 +0\.35 +0\.5 +0\.175$",
        r"  limit 0\.4 +0\.7\d\d +\+0\.0\d{3} +2\d$",
        r"  layer 7  3[0-3]{43}$",
        r"  dense +1\.000 +\+0\.0000 +23 +1\.00x$",
    ],
    "17": [
        r"  the same again +served: park\. Anna was +right: park\. Anna was$",
        r"  other weights +served: park\. .* <- wrong$",
        r"ids \[1, 23\] and \[12, 3\], glued together: 123 and 123$",
        r"  4 tokens +4 +64,183,296 +misses$",
        r"  the same again +0 +0 +exact hits$",
        r"  temperature 2, no seed +4 +64,183,296 +bypassed$",
        r"  another first token +77 11 12 13 \[d7c5\]  14 15 16 17 \[d6f8\] ",
        r"  Zoe +144 +128 +242,351,872 +28,442,368 +0\.12$",
        r"  0\.144  same answer: yes  please help me cancel my order / ",
        r"  1\.0000  Tom the other way +answer: garden$",
        r"  0\.999 +6\d% +1\d of 1\d\d +[6-9]\.\d% +1\d\.\d% +[4-7]\.\d%$",
        r"  none of  300 wrong: P\(wrong \| hit\) is at most 0\.99%$",
        r"  60% kept   9\.0 #+$",
        r"  all +345 +\d\d% +9[67]%$",
        r"A right answer is surer than a wrong one in [5-9]\d% of all pairs",
        r"  0\.\d\d +\d\d% +0\.\d\d +\d\d\.\d% +\d\d\.\d% +\d\d\.\d%$",
        r"  questions +\d+% +[01]\.\d\d +\d+%$",
        r"  one voter is right: 0\.4   the majority: 0\.352$",
        r"  101 +\d+% +\d+% +\d\d%$",
        r"[5-9] votes take 1\.\d\d of the work of one greedy answer$",
        r"  semantic cache  all +the words, roughly ",
    ],
    "18": [
        r"  token B +\[1 2 0\] kitchen +\[3 2 0\] park +\[4 2 0\] park$",
        r"  layer 1 +1 +2 +3$",
        r"5 runs of a layer, one after another, for up to 3 tokens\.$",
        r"  E = 2  7\d% #+$",
        r"  E = 7  9\d% #+$",
        r"  1 +[12]\.\d\d +6\.\d +[12]\.\d\d +(0\.9\d|1\.0\d)$",
        r"  2 +[23]\.\d\d +[45]\.\d +1\.\d\d +0\.[67]\d$",
        r"  7 +4\.\d\d +[78]\.\d +1\.\d\d +(0\.9\d|1\.0\d)$",
        r"guess: what I am$",
        r"  nothing +1\.\d\d #+$",
        r"  its own continuation +[12]\.\d\d #+$",
        r"  pass 6  \[3, 7, 4, 9, 8, 6\]$",
        r"  pass 3  \[12, 8, 7, 6, 6, 6\]$",
        r"  1  park +\|",
        r"8 tokens in [78] passes$",
        r"  kept +[2-5]\d% #+$",
        r"  prompt_lookup +1\.\d\d +1\.\d\d +0\.[67]\d +\d\.\d\d$",
        r"  jacobi +1\.0\d +3\.\d\d +[01]\.\d\d +\d\.\d\d$",
        r"  lookahead +1\.\d\d +[34]\.\d\d +0\.[67]\d +\d\.\d\d$",
        r"  random n-grams +1\.\d\d +[56]\.\d\d ",
    ],
}


class Run(NamedTuple):
    status: int
    out: str
    err: str
    cpu: float  # seconds of CPU time, which other programs do not change
    files: list  # left in the working directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``run(name)`` gives the run of a tutorial. All are started by the first, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(
                run_tutorial, FOLDER / name, *map(tmp_path_factory.mktemp, ("cwd", "temporary"))
            )
            for name in NAMES
        }
        yield lambda name: started[name].result()


def run_tutorial(path: Path, folder: Path, temporary: Path) -> Run:
    """``python path`` in an empty folder, with every warning an error and one BLAS thread."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "TQDM_DISABLE": "1",  # progress bars, which only a slow machine shows, are no warnings
        "TMPDIR": str(temporary),  # where pictures go
    }
    done = subprocess.run(
        [sys.executable, "-c", TIMED, sys.executable, "-W", "error", str(path)],
        cwd=folder,
        env=os.environ | settings | ONE_THREAD,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=HUNG,
    )
    text, _, cpu = done.stdout.rpartition("\n")
    return Run(done.returncode, text, done.stderr, float(cpu), sorted(folder.iterdir()))


# Runs a command, and prints in a last line how much CPU time it took.
TIMED = """
import os, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
times = os.times()
print()
print(times.children_user + times.children_system, end="")
sys.exit(status)
"""


# Running -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_runs_to_its_end_from_any_directory(runs, name):
    run = runs(name)
    assert run.err == "", "a tutorial must not print warnings or errors"
    assert run.status == 0


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_prints_what_it_is_about_in_order(runs, name):
    lines = iter(runs(name).out.splitlines())
    for wanted in PRINTS.get(name[:2], []):  # `lines` goes on after the last line found
        assert any(re.match(wanted, line) for line in lines), f"not printed, or not here: {wanted}"


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_is_quick(runs, name):
    assert runs(name).cpu < CPU_SECONDS


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_writes_nothing_into_the_working_directory(runs, name):
    assert runs(name).files == []


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_output_fits_the_screen(runs, name):
    wide = [line for line in runs(name).out.splitlines() if len(line) > COLUMNS]
    assert wide == [], f"lines of more than {COLUMNS} characters"


# Form --------------------------------------------------------------------------------------------


def test_tutorials_are_named_by_number_and_question():
    assert NAMES, "there are no tutorials"
    assert all(re.fullmatch(r"\d\d_[a-z_]+\.py", name) for name in NUMBERED)
    numbers = [name[:2] for name in NUMBERED]
    assert len(set(numbers)) == len(numbers), "two tutorials have the same number"


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_begins_with_its_question(name):
    text = ast.get_docstring(ast.parse(SOURCES[name]))
    assert text.startswith(f"Tutorial {int(name[:2])}: ")
    assert "?" in text.partition("\n\n")[0], "the first paragraph asks the question"


def cells_of(name) -> list[tuple[str, str]]:
    """(kind, text) of each cell: "[markdown]" or "" for code."""
    found = re.split(r"^# %%(.*)\n", SOURCES[name], flags=re.MULTILINE)
    assert found[0] == "", "the file begins with a cell"
    return [(kind.strip(), text.strip("\n")) for kind, text in zip(found[1::2], found[2::2])]


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_is_a_notebook_of_prose_and_code(name):
    """Cells as Jupytext and editors know them: prose becomes markdown, not a comment in code."""
    for number, (kind, text) in enumerate(cells_of(name)):
        assert kind in ("[markdown]", ""), f"a cell of an unknown kind: {kind}"
        lines = text.splitlines()
        if kind == "":
            assert not lines[0].startswith("#"), f"prose at the start of a code cell: {lines[0]}"
            assert not lines[-1].startswith("#"), f"prose at the end of a code cell: {lines[-1]}"
        elif number:
            assert all(re.match(r"#( |$)", line) for line in lines), "code in a markdown cell"
            prose = re.sub(r"`[^`]*`", "", re.sub(r"^#     .*$", "", text, flags=re.MULTILINE))
            assert not re.search(r"<[A-Za-z/]|\w\*\w", prose), "markdown would take this for markup"


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_has_titles_and_ends_with_exercises(name):
    titles = re.findall(r"^# ## (.+)$", SOURCES[name], re.MULTILINE)
    assert len(titles) >= 5
    kind, text = cells_of(name)[-1]
    assert kind == "[markdown]" and text.startswith("# ## Exercises\n")


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_says_which_exercises_continue_it(name):
    _, text = cells_of(name)[-1]
    named = re.findall(r"^# - `minitx learn (\d+)`: (.+)$", text, re.MULTILINE)
    assert named, "no exercise continues this tutorial"
    for number, title in named:
        assert find_exercise(number).title == title


@pytest.mark.parametrize("name", NAMES)
def test_every_question_of_a_tutorial_has_an_answer(name):
    """tutorials/answers has a file of the same name, with a cell "Question N" for each question."""
    _, text = cells_of(name)[-1]
    questions = re.findall(r"^# (\d+)\. ", text, re.MULTILINE)
    assert f"`tutorials/answers/{name}`" in text
    answers = (ANSWERS / name).read_text("utf-8")
    assert re.findall(r"^# ## Question (\d+)", answers, re.MULTILINE) == questions
    assert answers.count("\nassert ") >= len(questions), "each answer is checked"


@pytest.mark.parametrize("name", NAMES)
def test_answers_hold(name, monkeypatch, capsys):
    """They assert what they say; run in this process, which has the packages loaded already."""
    monkeypatch.setattr(sys, "path", [str(ANSWERS), *sys.path])
    monkeypatch.delitem(sys.modules, "helpers", raising=False)
    runpy.run_path(str(ANSWERS / name), run_name="__main__")
    assert capsys.readouterr().out.count("Question ") >= 1


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_asserts_what_it_claims(name):
    tree = ast.parse(SOURCES[name])
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))


@pytest.mark.parametrize("name", NAMES)
def test_tutorial_leaves_shared_setup_to_the_helpers(name):
    own = {node.name for node in ast.parse(SOURCES[name]).body if isinstance(node, ast.FunctionDef)}
    shared = ast.parse((FOLDER / "helpers.py").read_text("utf-8")).body
    known = {node.name for node in shared if isinstance(node, ast.FunctionDef)}
    assert own & known == set()


def test_flat_forward_of_tutorial_1_is_numpy_and_nothing_else():
    """No class, no function of minitx: the only names it uses are its own, NumPy, and builtins."""
    flat = next(
        node
        for node in ast.parse(SOURCES["01_from_token_to_text.py"]).body
        if isinstance(node, ast.FunctionDef) and node.name == "flat_forward"
    )
    names = [node for node in ast.walk(flat) if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    own |= {argument.arg for argument in flat.args.args}
    assert {node.id for node in names} - own == {"np", "len", "range", "bool"}


# Helpers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def helpers():
    spec = importlib.util.spec_from_file_location("tutorial_helpers", FOLDER / "helpers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_print_table_aligns_columns(helpers, capsys):
    helpers.print_table(["name", "count"], [["a", 1234], ["longer", "0.5"]])
    assert capsys.readouterr().out == "  name     count\n  a        1,234\n  longer     0.5\n"


def test_bar_chart_bars_are_proportional(helpers, capsys):
    helpers.bar_chart(["none", "half", "full"], [0, 0.5, 1.0], "{:.0%}", width=4)
    assert capsys.readouterr().out == "  none    0% \n  half   50% ##\n  full  100% ####\n"


def test_speedup_of_a_task_that_takes_twice_as_long(helpers, monkeypatch):
    now = [0]
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: now[0])

    def task(*seconds):  # of each turn; the first, a warm-up, does not count
        turns = iter(seconds)

        def run():
            now[0] += next(turns)

        return run

    assert helpers.speedup(task(9, 4, 2, 8), task(7, 1, 4, 2), repeats=3) == 2
    best = helpers.time_side_by_side(task(9, 4, 2, 8), task(7, 1, 4, 2), repeats=3)
    assert best == [2, 1], "the best time of each"


@pytest.mark.skipif(os.name == "nt", reason="Windows measures the time of a thread too coarsely")
def test_own_time_does_not_count_the_time_of_others(helpers):
    assert helpers.time_side_by_side(lambda: time.sleep(0.05), repeats=1, own_time=True)[0] < 0.025


def test_tree_changes_shows_changed_parts_and_where_they_are(helpers, capsys):
    before, after = (minitx.load("stories", **f).model for f in ({}, {"fold_norms": True}))
    helpers.tree_changes(before, after)
    lines = capsys.readouterr().out.splitlines()
    assert "-         norm: RMSNorm(gain 128, eps=1e-05)" in lines
    assert "+         norm: WeightlessRMSNorm(eps=1e-05)" in lines
    assert any("attn: Attention" in line for line in lines), "the part around a change"
    assert not any("rope" in line for line in lines), "unchanged parts are left out"


def test_count_last_counts_one_token_with_the_others_cached(helpers):
    lm = minitx.load("stories")
    c, ids = lm.model.config, list(range(10, 30))
    counts = helpers.count_last(lm, ids).total()
    assert counts.cache_bytes == c.layers * 2 * c.kv_heads * c.head_width * 4 * len(ids)


def test_evaluate_stories_agrees_with_minitx_eval(helpers):
    lm, read = minitx.load("stories"), helpers.held_out_stories(6)
    scores, report = helpers.evaluate_stories(lm, read), evaluate(lm, lm.tokenizer, read)
    assert scores.loss["other text"] == pytest.approx(report.loss, rel=1e-5)
    hops = {"1 hop": 1, "2 hops": 2, "3 hops": 3, "counts": 0}
    found = {group: a for group, a in scores.accuracy.items() if group != "other text"}
    assert found == {group: report.by_hops[h] for group, h in hops.items() if h in report.by_hops}


def test_answers_in_stories_are_those_that_evaluate_stories_judges(helpers):
    lm, read = minitx.load("stories"), helpers.held_out_stories(6)
    right: dict = {}
    for ids, answer, group in helpers.answers_in(lm, read):
        right.setdefault(group, []).append(lm.model.next_argmax(ids) == answer)
    scores = helpers.evaluate_stories(lm, read)
    expected = {group: a for group, a in scores.accuracy.items() if "hop" in group}
    assert {group: sum(each) / len(each) for group, each in right.items()} == expected


def test_save_picture_names_the_file_or_what_it_needs(helpers, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(helpers.tempfile, "gettempdir", lambda: str(tmp_path))
    helpers.save_lines("try", [1, 2], {"a line": [3, 4]}, "x", "y")
    out = capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "minitx-tutorials" / "try.png").stat().st_size > 1000
        assert "try.png" in out
    else:
        assert "pip install matplotlib" in out
