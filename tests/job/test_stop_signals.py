"""Signals of a rank: stop requests, also where a library handles them."""

import os
import signal

from distrain.job.stop_signals import stop_signals


class Stopped:
    requests = 0

    def request_stop(self):
        self.requests += 1


def test_a_handler_of_the_data_set_or_the_model_does_not_prevent_the_stop(caplog):
    trainer, heard = Stopped(), []
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))  # as a library does
        stop.forward_to(trainer)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (trainer.requests, heard) == (1, [])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("SIGTERM requests a stop with a checkpoint: the handler")
    assert signal.getsignal(signal.SIGTERM) is before
