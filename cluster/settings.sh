# The one place for what is yours. Every node of the three clusters in this folder reads it.
#
# Keep secrets out of it: nodes reach a bucket by rights of their own (the instance's role on AWS, the service
# account on Kubernetes, ~/.aws on a host of yours).

BUCKET=s3://my-bucket  # SET

# The data set: what each node copies before it starts, and where that then lies on it: a folder that holds
# UCF-101/ and ucfTrainTestlist/. An empty source copies nothing: the data lie there already.
UCF101_SOURCE=$BUCKET/UCF-101
export UCF101_ROOT=$HOME/data/UCF-101

# The run directories: a place that all nodes see, in a bucket or in a folder on NFS.
export TUNE_EASYTRAIN_STORAGE=$BUCKET/runs

# The same Ray and the same minor version of Python on all nodes.
RAY_VERSION=2.60.0
PYTHON=python3

# Who reaches a port of a Ray cluster without authentication runs code on it.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/tune_easytrain/cluster/auth_token  # made by the head
export RAY_USAGE_STATS_ENABLED=0
