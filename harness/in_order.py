"""Results of threads or processes in the order in which they were asked for."""
import collections


def in_order(futures, ahead):
    """Yield the result of each future; up to `ahead` more are at work or done by then.

    futures: made when they are asked for, like (pool.submit(function, item) for item in items).
    """
    pending = collections.deque()
    try:
        for future in futures:
            pending.append(future)
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
