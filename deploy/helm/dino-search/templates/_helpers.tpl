{{- define "dino-search.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "dino-search.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "dino-search.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "dino-search.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "dino-search.selectorLabels" -}}
app.kubernetes.io/name: {{ include "dino-search.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "dino-search.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "dino-search.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "dino-search.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "dino-search.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "dino-search.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- $suffix := ternary "-cuda" "" .Values.gpu.enabled }}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s%s" .Chart.AppVersion $suffix) .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "dino-search.hasDatabase" -}}
{{- if or .Values.database.existingSecret .Values.database.url }}yes{{ end }}
{{- end }}

{{- define "dino-search.databaseSecret" -}}
{{- default (printf "%s-database" (include "dino-search.fullname" .)) .Values.database.existingSecret }}
{{- end }}

{{- define "dino-search.claim" -}}
{{- default (include "dino-search.fullname" .) .Values.persistence.existingClaim }}
{{- end }}

{{- define "dino-search.isShared" -}}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) }}yes{{ end }}
{{- end }}

{{/* Values that fit their types and not each other. */}}
{{- define "dino-search.check" -}}
{{- if and .Values.database.existingSecret .Values.database.url }}
{{- fail "database: give existingSecret or url, not both" }}
{{- end }}
{{- if include "dino-search.isShared" . }}
{{- if not (include "dino-search.hasDatabase" .) }}
{{- fail "several replicas need a database: SQLite is for one. Set database.existingSecret" }}
{{- end }}
{{- if not .Values.persistence.enabled }}
{{- fail "several replicas share one home: set persistence.enabled" }}
{{- end }}
{{- if and (not .Values.persistence.existingClaim) (ne .Values.persistence.accessMode "ReadWriteMany") }}
{{- fail "several replicas share one home: set persistence.accessMode to ReadWriteMany and a storageClass that offers it" }}
{{- end }}
{{- end }}
{{- if and .Values.photos.existingClaim .Values.photos.volume }}
{{- fail "photos: give existingClaim or volume, not both" }}
{{- end }}
{{- if and (eq (toString (default "auto" .Values.settings.keys)) "off") (ne (toString (default false .Values.settings.allow_public_without_keys)) "true") }}
{{- fail "settings.keys off lets everybody who reaches the port do everything: set settings.allow_public_without_keys, too" }}
{{- end }}
{{- range $name := list "home" "database" "host" "port" }}
{{- if hasKey $.Values.settings $name }}
{{- fail (printf "settings.%s: the chart sets it" $name) }}
{{- end }}
{{- end }}
{{- end }}
