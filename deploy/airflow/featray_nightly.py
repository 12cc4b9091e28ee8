"""Refresh an output every night from Airflow, as the CronJob in deploy/kubernetes/cronjob does.

kubectl apply -n featray -k deploy/kubernetes/base
cp deploy/airflow/featray_nightly.py "$AIRFLOW_HOME/dags/"

The first command makes the config map, the service account and the network policy that the pod uses. Needs
Airflow 3 with apache-airflow-providers-cncf-kubernetes, and its connection to the Kubernetes cluster. If
another run holds the output (exit code 4), the task is skipped. Other failures are tried again twice.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG
from kubernetes.client import models as k8s

NAMESPACE = "featray"
IMAGE = "featray:0.1.0"
USER = 10001

with DAG(
    dag_id="featray_nightly",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    KubernetesPodOperator(
        task_id="refresh",
        namespace=NAMESPACE,
        image=IMAGE,
        arguments=["refresh", "/etc/featray/featray.yaml", "--set", "run.engine=inline"],
        labels={"app.kubernetes.io/part-of": "featray"},
        service_account_name="featray",
        automount_service_account_token=False,
        env_from=[k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name="featray-store", optional=True))],
        container_resources=k8s.V1ResourceRequirements(
            requests={"cpu": "4", "memory": "8Gi", "ephemeral-storage": "10Gi"},
            limits={"cpu": "4", "memory": "8Gi", "ephemeral-storage": "10Gi"},
        ),
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        container_security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        volumes=[
            k8s.V1Volume(name="config", config_map=k8s.V1ConfigMapVolumeSource(name="featray-config")),
            k8s.V1Volume(name="scratch", empty_dir=k8s.V1EmptyDirVolumeSource(size_limit="10Gi")),
        ],
        volume_mounts=[
            k8s.V1VolumeMount(name="config", mount_path="/etc/featray", read_only=True),
            k8s.V1VolumeMount(name="scratch", mount_path="/tmp"),
        ],
        termination_grace_period=300,
        skip_on_exit_code=4,
        retries=2,
        retry_delay=timedelta(minutes=5),
        get_logs=True,
        on_finish_action="delete_succeeded_pod",
    )
