"""Random graphs for the contract: drawn by Hypothesis, run at many batch sizes and histories, compared bit for bit.

    PYTHONPATH=tests python -m fuzzing --graphs 200 --seed 1 --target cpu --stock

``program``     a graph as a value: a few lines of Python and what they take
``operations``  the lines a graph can have, none of which lets one row see another
``strategies``  how they are drawn
``comparison``  what is run and compared, and counted
``shrinking``   a violation cut down to a runnable snippet
``campaign``    bundles of graphs compared and counted
``schedule``    which bundle is next, and the line of the CSV for one that is finished
``workers``     the processes that share them
"""
