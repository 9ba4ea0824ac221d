"""Chords: the tasks of a header publish events to a log, and a joiner consumes the log.

| file         | what it contains                                                             |
| ------------ | ---------------------------------------------------------------------------- |
| events.py    | the format of the messages in the log                                        |
| log.py       | publishes events: the size of a chord, its parts, tasks added to it          |
| reducer.py   | the state of the open chords, as the sum of their events                     |
| shard.py     | consumes one queue of the log, and commits                                   |
| joiner.py    | the thread that consumes all queues of the log                               |
| bodies.py    | what a complete chord does: calls its body, or its errbacks                  |
| producer.py  | makes the message of a body, with the results of the header in it            |
| routes.py    | the queues of the application that a chord belongs to                        |
| settle.py    | chords that need not succeed as a whole                                      |
| lazy.py      | bodies that get the results of their header by reference                     |
| status.py    | the answers of joiners to questions about open chords                        |
| asker.py     | asks joiners                                                                 |
| tracing.py   | continues the traces of OpenTelemetry and Sentry                             |
| forks.py     | lets a process fork while its joiner runs                                    |

The states of a chord in its joiner::

    size event ----+
    parts ---------+--> held --> complete --> committed
    added tasks ---+     | ^        |  |
    cancellation --+     v |        |  +--> failed: errbacks are called in a thread, then committed
                       merged       +-----> postponed: its queue does not take the body; tried again later

- *held*: its messages are delivered and not acknowledged.
- *merged*: many small messages are replaced by one with the same content, in one commit, to spare the broker.
- *complete*: all parts are there, or its terms are met, its deadline is over, or it was cancelled.
- *committed*: the body is published and all its messages are acknowledged, in one transaction.

Invariants:

- An event is acknowledged only in the commit that makes it unnecessary: whenever a joiner dies, the next one gets
  all events of the open chords again.
- Events may arrive in any order, and several times: the state of a chord does not depend on either.
- A chord does not become complete while a merge of its events is in flight: otherwise the merged message would
  arrive after the commit, and belong to no chord.
- A joiner commits no chord before it has read what was in the queue when it started: an event that adds a task may
  be behind the last part.
- No exception of a user's code reaches the loop of the joiner.
"""
