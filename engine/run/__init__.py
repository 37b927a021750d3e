"""One run from settings to exported student: what it is made of, its stages, its one training loop, what it writes.

In the order of a run: `job` names its steps; `choices` settles settings; `inputs`, `members`, `examples`, `losses` (with
`domains`, `matching`) and `machine` make what `setup` holds; `stages` trains it, with `teachers`, `answers`, `prototypes` and
`states`, phase by `phase` in the loop of `trainer` (`tally`, `evaluation`, `interrupts`; `resume`, `checkpoint`); `results`
leaves it in the directory of `output`.

Imports every room but the commands' (compare, profiling, engine.train). Another stage is a method of `stages.Stages`.
"""
