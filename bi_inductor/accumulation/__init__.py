"""Weight gradients that go on from ``parameter.grad``: micro-batches add up to the bits of the whole batch.

``options={"batchinv.continue_gradients": True}``. Adding the gradient of a second micro-batch to that of a first is
(sum of rows) + (sum of rows), another order of additions than one sum over all rows. Here the second sum *starts* from
the first one's result, so that the order is the same however the rows are cut::

    marking      Dynamo's graph: each fp32 parameter passes through ``ops.continuing(parameter, start)``
    continuing   the backward graph: ``continued(start, gradient)`` moves into the product or sum behind ``gradient``
    runtime      ``start`` is ``parameter.grad`` as the backward finds it, and the result replaces it

A gradient whose sum cannot be continued (an embedding's, a parameter's that is used twice) is refused by name.
"""
