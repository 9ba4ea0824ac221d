"""Chords: what happens to one is an event in a log, and whoever reads the log joins it.

| file         | what it is                                                                   |
| ------------ | ---------------------------------------------------------------------------- |
| events.py    | the messages of the log                                                      |
| log.py       | sends them: the size of a chord, its parts, tasks that were added to it      |
| reducer.py   | what is known of the open chords, and how it is kept in the broker           |
| bodies.py    | the messages that a joined chord goes on with                                |
| lazy.py      | results by reference                                                         |
| shard.py     | reads one queue of the log, and commits what follows                         |
| joiner.py    | reads all of them                                                            |
| forks.py     | lets a process fork beside the joiner                                        |
| worker.py    | runs the joiner in a worker's main process                                   |
| status.py    | asks the joiners for their open chords                                       |
"""
